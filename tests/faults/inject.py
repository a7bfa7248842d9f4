# SPDX-License-Identifier: Apache-2.0
"""Runs in every rank: keeps its journal, and sends the signal to itself when the case says."""

from __future__ import annotations

import functools
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mimo_colocated import phases
from tests.faults.cases import ANY, Case
from tests.faults.journal import Journal

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
    _journal_collectives(journal)
    if ours is not None and ours.phase in (ANY, phases.START):
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
        journal.write(fault=case.signal)
        os.kill(os.getpid(), getattr(signal, case.signal))

    if not case.delay:
        fire()
        return
    timer = threading.Timer(case.delay, fire)
    timer.daemon = True
    timer.start()


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
