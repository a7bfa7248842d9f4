# SPDX-License-Identifier: Apache-2.0
"""PyTorch's flight recorder of this rank, saved when something goes wrong.

PyTorch records every collective of NCCL and gloo: kind, process group, number, shapes, whether it
has ended. A build for CUDA has two recorders, NCCL's and that of all others. NCCL's watchdog writes
the record by itself when a collective takes too long; gloo has no such watchdog, so :class:`Watch`
writes it: when this rank fails, and when another one has. Gloo's record lacks the ranks of the
groups, which are added here so that PyTorch's own analysis reads it (``torchfrtrace FOLDER -p
rank_``), and sends and receives (:func:`.phases.waiting` notes these).
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mimo_colocated import phases
from mimo_colocated.forensics.evidence import DUMP

ENTRIES = 2000
"""Collectives that are remembered, if nobody asks for another number."""

_SWITCH = "TORCH_FR_BUFFER_SIZE"
# Their older names, of NCCL only.
_SWITCHES = (_SWITCH, "TORCH_NCCL_TRACE_BUFFER_SIZE")
_TICK_S = 0.2


def switch_on(folder: str | Path, entries: int = ENTRIES) -> None:
    """Record this rank's collectives from now on; before the first process group is made.

    What the environment says already stays as it is, ``TORCH_FR_BUFFER_SIZE=0`` (off) too.

    Args:
        folder: where NCCL's own watchdog writes ``nccl_rank_N`` on a timeout.
        entries: collectives that are remembered.
    """
    if not any(name in os.environ for name in _SWITCHES):
        os.environ[_SWITCH] = str(entries)
    # Older releases of PyTorch know the second name of the file only.
    for name in ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"):
        os.environ.setdefault(name, str(Path(folder) / "nccl_rank_"))
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    # The watchdog makes no folder.
    with contextlib.suppress(OSError):
        Path(os.environ["TORCH_FR_DUMP_TEMP_FILE"]).parent.mkdir(parents=True, exist_ok=True)


def take_record() -> list[bytes]:
    """Return this rank's record as the recorders give it; :func:`read_record` reads it.

    Where in the program each collective was called is left out: to say it PyTorch imports its
    compiler, 800 modules.
    """
    return _recorded("", {"includeStackTraces": False}, RuntimeError)


def read_record(record: Sequence[bytes]) -> dict[str, Any] | None:
    """Return a record, of both recorders; ``None`` if PyTorch has none.

    ``pg_config`` is completed by the groups that this process has.
    """
    taken = [pickle.loads(each) for each in record]
    if not taken:
        return None
    whole: dict[str, Any] = {}
    for dump in taken:
        whole |= dump
    for key in ("pg_config", "pg_status"):
        whole[key] = {name: each for dump in taken for name, each in dump.get(key, {}).items()}
    config = {name: dict(entry) for name, entry in whole["pg_config"].items() if name}
    entries = [entry for dump in taken for entry in dump.get("entries", [])]
    return {**whole, "entries": entries, "pg_config": {**_groups(), **config}}


def _recorded(suffix: str, how: dict[str, Any], *errors: type[Exception]) -> list[Any]:
    """What the recorders say that this build of PyTorch has: of gloo first, then of NCCL."""
    c10d: Any = dist.distributed_c10d
    module = c10d.torch._C._distributed_c10d
    found = []
    for name in ("_dump_fr_trace", "_dump_nccl_trace"):
        function = getattr(module, name + suffix, None)
        if function is not None:
            with contextlib.suppress(*errors):
                found.append(function(**how))
    return found


def _groups() -> dict[str, dict[str, str]]:
    """Name -> what PyTorch's analysis wants to know of a group of this process."""
    world = dist.distributed_c10d._world
    found = {}
    for group, name in list(world.pg_names.items()):
        ranks = sorted(world.pg_group_ranks.get(group, {}))
        desc = getattr(group, "group_desc", "")
        found[str(name)] = {"name": str(name), "desc": desc, "ranks": json.dumps(ranks)}
    return found


def progress() -> tuple[tuple[str, int, int], ...]:
    """Return (group, collectives entered, collectives ended) of every group; cheap, for polling."""
    status: dict[str, Any] = {}
    for taken in _recorded("_json", {"includeCollectives": False}, RuntimeError, TypeError):
        with contextlib.suppress(ValueError):
            status |= json.loads(taken).get("pg_status", {})
    entered, ended = "last_enqueued_collective", "last_completed_collective"
    return tuple((n, int(each[entered]), int(each[ended])) for n, each in sorted(status.items()))


class Watch(threading.Thread):
    """Looks after one rank from a thread of its own; ends with the process.

    While the rank waits in a collective for longer than a tick, the thread keeps the record as it
    is then: once the collective has failed, the recorder no longer says that it was under way.

    Args:
        folder: where the dumps go; shared by all ranks.
        rank: this one.
        asked: whether another rank has failed, so that this one's record is wanted; called every
            0.2 s.
    """

    def __init__(self, folder: Path, rank: int, asked: Callable[[], bool]) -> None:
        super().__init__(daemon=True, name="flight recorder")
        self.path, self._asked = folder / DUMP.format(rank=rank), asked
        self._kept: tuple[Any, list[bytes]] = (None, [])
        self._lock = threading.Lock()

    def run(self) -> None:
        """Look, until a dump was asked for and saved."""
        before: Any = None
        while not self.path.exists():
            now = progress()
            if now == before and _under_way(now):
                with self._lock:
                    if self._kept[0] != _entered(now):
                        self._kept = (_entered(now), take_record())
            before = now
            if self._asked():
                self.settle()
                self.save()
            time.sleep(_TICK_S)

    def settle(self, patience_s: float = 3.0) -> None:
        """Wait until this rank gets no further, so that what it waits in is in the record."""
        deadline, before = time.monotonic() + patience_s, None
        while time.monotonic() < deadline:
            now = progress()
            if now == before and (_under_way(now) or phases.here().wait is not None):
                return
            before = now
            time.sleep(_TICK_S)

    def save(self) -> Path | None:
        """Write this rank's record, once; the file, ``None`` if PyTorch has no record."""
        with self._lock:
            if self.path.exists():
                return self.path
            entered, kept = self._kept
            dump = read_record(kept if entered == _entered(progress()) else take_record())
            if dump is None:
                return None
            temporary = self.path.with_name(f".{self.path.name}.tmp")
            with contextlib.suppress(OSError):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                temporary.write_bytes(pickle.dumps(dump))
                temporary.replace(self.path)
                return self.path
            return None


def _under_way(status: tuple[tuple[str, int, int], ...]) -> bool:
    return any(entered > ended for _, entered, ended in status)


def _entered(status: tuple[tuple[str, int, int], ...]) -> tuple[tuple[str, int], ...]:
    return tuple((name, entered) for name, entered, _ in status)
