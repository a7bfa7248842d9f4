# SPDX-License-Identifier: Apache-2.0
"""One outcome on all ranks of something that all ranks do, even if it fails on only one of them.

An action that has collectives inside can fail on one rank while its peers wait in one of them: the
failing rank must not start another collective then. It leaves its reason in the job's key-value
store instead and returns; once its process ends, the peers lose the connection and find the reason.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from megatron.core.models.mimo.comm.plan_guard import LOST_PEER

# How long a rank that failed waits for the reasons of ranks that failed with it.
_PATIENCE_S = 5.0
# Megatron-Core's writers pass on an error's text, not the error.
_DISK_FULL = re.compile("|".join(re.escape(os.strerror(n)) for n in (errno.ENOSPC, errno.EDQUOT)))
_calls = itertools.count()


@dataclass(frozen=True)
class Failure:
    """Why an action failed.

    Attributes:
        rank: that failed.
        reason: one line.
        distance: 0 for what the failing rank says itself, 1 for what another rank was told of it,
            2 for a rank that only noticed that another one failed or is gone.
    """

    rank: int
    reason: str
    distance: int = 0


def gathered(own: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Return what every rank of a group has to say, in rank order; all of them call it.

    Args:
        own: of this rank; it is pickled.
        group: the ranks, all of them by default. Without ranks there is only this one's.
    """
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return [own]
    everywhere: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everywhere, own, group=group)
    return everywhere


def run_together(action: Callable[[], Any], *, has_collectives: bool) -> Failure | None:
    """Run ``action`` on this rank and learn whether all ranks succeeded; all ranks call it.

    Args:
        action: what this rank does.
        has_collectives: ``action`` waits for other ranks, who may wait in vain.

    Returns:
        None if all ranks succeeded, else the failure to name.

    With ``has_collectives`` a rank that fails leaves the others in a collective. Over gloo that
    ends at once, over NCCL after the timeout, in the watchdog, if no launcher ends these ranks
    first: they then end without the failure that this rank names.

    Raises:
        RuntimeError: a rank is gone without a reason (killed).
    """
    call, failure = next(_calls), None
    try:
        with _overheard() as overheard:
            action()
    except (Exception, CheckpointException) as error:  # the latter is no Exception
        failure = _failure_of(error, overheard)
        if has_collectives:
            found = _tell(call, failure)
            if found.distance == 2 and not isinstance(error, CheckpointException):
                raise
            return found
    try:
        failures = gathered(failure)
    except RuntimeError:
        found = _first(_told(call))
        if found is None:
            raise
        return found
    return _first([each for each in failures if each])


@contextlib.contextmanager
def _overheard() -> Iterator[list[str]]:
    """Errors that Megatron-Core's checkpointing logs in the block, instead of on the console.

    Its writers log why a file could not be written; what they raise then may not say it.
    """
    messages: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("megatron.core.dist_checkpointing")
    before, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.propagate = before


def _failure_of(error: BaseException, overheard: list[str]) -> Failure:
    rank = dist.get_rank()
    if overheard:
        return Failure(rank, _reason(overheard[0].rpartition(" error: ")[2]))
    if isinstance(error, CheckpointException):
        if not error.failures:  # only the coordinating rank knows more
            return Failure(rank, "another rank failed", distance=2)
        other, (error, _) = min(error.failures.items(), key=lambda item: item[0])
        return Failure(other, _short(error), distance=int(other != rank))
    lost = isinstance(error, RuntimeError) and LOST_PEER.search(str(error)) is not None
    return Failure(rank, _short(error), distance=2 if lost else 0)


def _short(error: BaseException) -> str:
    """One line of the innermost cause, where the reason stands."""
    while error.__cause__ is not None:
        error = error.__cause__
    error = _of_the_disk(error) or error
    text = str(error).strip()
    if isinstance(error, OSError) and error.errno is None and text:
        return _reason(text)  # our own words
    return _reason(f"{type(error).__name__}: {text}" if text else type(error).__name__)


def _of_the_disk(error: BaseException | None) -> OSError | None:
    """The system's error that ``error`` came after: PyTorch's file writer hides a full disk."""
    while error is not None and not (isinstance(error, OSError) and error.errno is not None):
        error = error.__context__
    return error


def _reason(text: str) -> str:
    full = _DISK_FULL.search(text)
    if full:
        return f"the disk is full ({full[0]}); make room there and resume"
    kind, colon, rest = text.partition(": ")
    lines = [line.strip() for line in rest.splitlines() if line.strip()]
    return f"{kind}{colon}{lines[-1] if lines else rest}"


def _tell(call: int, failure: Failure) -> Failure:
    """Publish ``failure``, wait a little for those of the peers, and return the one to name."""
    with contextlib.suppress(RuntimeError):  # the store is gone with the rank that held it
        store = dist.distributed_c10d._get_default_store()
        number = store.add(_key(call), 1)
        store.set(f"{_key(call)}/{number}", json.dumps(asdict(failure)))
        deadline = time.monotonic() + _PATIENCE_S
        while store.add(_key(call), 0) < dist.get_world_size() and time.monotonic() < deadline:
            known = _first(_told(call))
            if known and known.distance < failure.distance == 2:
                break  # a peer knows the reason
            time.sleep(0.05)
    return _first(_told(call)) or failure


def _told(call: int) -> list[Failure]:
    """What was published, the earliest first."""
    found = []
    with contextlib.suppress(RuntimeError):
        store = dist.distributed_c10d._get_default_store()
        for number in range(1, store.add(_key(call), 0) + 1):
            key = f"{_key(call)}/{number}"
            store.wait([key], timedelta(seconds=_PATIENCE_S))
            found.append(Failure(**json.loads(store.get(key))))
    return found


def _first(failures: list[Failure]) -> Failure | None:
    """A failure that is its own reason, if there is one."""
    return next(iter(sorted(failures, key=lambda failure: failure.distance)), None)


def _key(call: int) -> str:
    return f"megatron_mimo_agreement/{call}"
