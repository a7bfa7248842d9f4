# SPDX-License-Identifier: Apache-2.0
"""Runs in every rank: keeps its journal, and sends the signal to itself when the case says."""

from __future__ import annotations

import builtins
import errno
import functools
import io
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mimo_colocated import phases
from mimo_colocated.stop_requests import StopRequests
from tests.faults.cases import ANY, APART, BROKEN, FULL, WRITES, Case
from tests.faults.journal import Journal

# Where writes go instead; nowhere: they are errors.
WRITES_BROKEN = {FULL: "/dev/full", BROKEN: ""}
# Not isend and irecv: batch_isend_irecv compares its operations with them.
_COLLECTIVES = (
    "all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "all_to_all",
    "all_to_all_single", "barrier", "broadcast", "broadcast_object_list", "gather",
    "gather_object", "reduce_scatter", "reduce_scatter_tensor", "scatter", "scatter_object_list",
    "batch_isend_irecv",
)  # fmt: skip


def watch_rank(rank: int, folder: Path, case: Case | None) -> None:
    """Keep the journal of this rank from now on, and do what the case says.

    The delay of a case without a phase counts from here.
    """
    journal = Journal(folder, rank)
    journal.write(event="start")
    ours = case if case is not None and case.rank == rank else None
    _journal_marks(journal, ours)
    _journal_agreements(journal)
    _journal_collectives(journal)
    if case is not None and case.signal == APART:
        _set_apart(journal, rank, folder)
    elif ours is not None and ours.phase in (ANY, phases.START):
        _fire_after(ours, journal)


def _journal_marks(journal: Journal, case: Case | None) -> None:
    """Every mark is written down before it is made; the case's entry makes the fault."""
    mark, counts, before = phases.mark, Counter(), [phases.START]

    def marked(phase: str, microbatch: int | None = None) -> None:
        own = phases._own
        number = own.microbatch if microbatch is None else microbatch
        entered = phase != before[0]
        before[0] = phase
        journal.write(phase=phase, step=own.step, microbatch=number, entered=entered)
        mark(phase, microbatch)
        counts[phase] += entered
        if case is not None and entered and (phase, counts[phase]) == (case.phase, case.entry):
            _fire_after(case, journal)

    phases.mark = marked
    at_step = phases.at_step

    def at_marked_step(step: int, *kind: str) -> None:
        # The phase stays, but the place that a message names is another one.
        journal.write(phase=phases._own.phase, step=step, microbatch=-1, entered=False)
        at_step(step, *kind)

    phases.at_step = at_marked_step


def _fire_after(case: Case, journal: Journal) -> None:
    def fire() -> None:
        if case.signal == "SIGTERM":
            _wait_until_received(signal.SIGTERM)
        journal.write(fault=case.signal)
        if case.signal in WRITES:
            _break_writes(WRITES_BROKEN[case.signal])
        else:
            os.kill(os.getpid(), getattr(signal, case.signal))

    if not case.delay:
        fire()
        return
    timer = threading.Timer(case.delay, fire)
    timer.daemon = True
    timer.start()


def _set_apart(journal: Journal, rank: int, folder: Path) -> None:
    from megatron.core.models.mimo.checkpoint.store import CheckpointStore

    build = CheckpointStore.__init__

    def built(self: CheckpointStore, root: Path, *args: Any, **kwargs: Any) -> None:
        journal.write(fault=APART)
        build(self, folder / "apart" if rank >= 4 else root, *args, **kwargs)

    CheckpointStore.__init__ = built


def _wait_until_received(sent: signal.Signals) -> None:
    """Until the rank has come so far that it receives a signal, which a forked one is told late."""
    while signal.getsignal(sent) is signal.SIG_DFL:
        time.sleep(0.001)


def _break_writes(device: str) -> None:
    """What this rank writes of a checkpoint goes to a device that takes nothing."""
    open_file = io.open

    def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if str(file).endswith(".distcp") and "r" not in mode:
            if device:
                return open_file(device, mode, *args, **kwargs)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return open_file(file, mode, *args, **kwargs)

    builtins.open = io.open = opened
    Path.open = lambda self, *args, **kwargs: opened(self, *args, **kwargs)


def _journal_agreements(journal: Journal) -> None:
    """Every agreement on stopping, with the steps that were done before it."""
    agreed = StopRequests.agreed

    def noted(self: StopRequests, *args: Any, **kwargs: Any) -> Any:
        done = sys._getframe(1).f_locals["done"]
        journal.write(agreed=done)
        return agreed(self, *args, **kwargs)

    StopRequests.agreed = noted


def _journal_collectives(journal: Journal) -> None:
    import torch.distributed as dist

    def noting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def noted(*args: Any, **kwargs: Any) -> Any:
            journal.write(collective=name, ranks=_ranks_of(args, kwargs))
            return function(*args, **kwargs)

        return noted

    for name in _COLLECTIVES:
        function = getattr(dist, name, None)
        if function is not None:
            setattr(dist, name, noting(name, function))


def _ranks_of(args: Sequence[Any], kwargs: dict[str, Any]) -> list[int]:
    """The ranks of the process group that a collective was called with."""
    import torch.distributed as dist

    values = [kwargs.get("group"), *args]
    if values[1:] and isinstance(values[1], list) and hasattr(values[1][0], "peer"):
        values = [values[1][0].group]  # a batch of sends and receives
    groups = [value for value in values if isinstance(value, dist.ProcessGroup)]
    return sorted(dist.get_process_group_ranks(groups[0] if groups else dist.group.WORLD))
