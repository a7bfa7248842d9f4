# SPDX-License-Identifier: Apache-2.0
"""What each rank does in a step, as text: phases, collectives and refusals, in order.

A move of code must not change a line of it. ``TracedWorld`` plays the ranks and writes down; the
texts lie in ``traces/`` and ``test_traces.py`` compares.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from mimo_colocated import phases
from tests.unit_tests.mimo import in_process_ranks
from tests.unit_tests.mimo.in_process_ranks import InProcessGroup, InProcessWorld


class TracedWorld(InProcessWorld):
    """Ranks as threads that write down what they do.

    Attributes:
        lines: rank -> its lines.
    """

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.lines: dict[int, list[str]] = {rank: [] for rank in range(size)}

    def note(self, line: str) -> None:
        """Add a line to the running rank's."""
        self.lines[in_process_ranks._here.rank].append(line)

    def collective(
        self,
        name: str,
        group: InProcessGroup,
        tensors: tuple[torch.Tensor, ...],
        work: Callable[[list[tuple[torch.Tensor, ...]]], None],
        same: bool = True,
    ) -> None:
        """As played, noted before it waits: a rank that hangs shows where."""
        shapes = [f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in tensors]
        self.note(f"    {name} over {list(group.ranks)}: {', '.join(shapes) or 'an object'}")
        super().collective(name, group, tensors, work, same)

    def make_own_group(self, ranks: Any) -> InProcessGroup:
        """As played, noted."""
        group = super().make_own_group(ranks)
        self.note(f"    makes the group {list(group.ranks)}")
        return group

    def text(self, body: Callable[[int], Any]) -> str:
        """Run ``body`` on all ranks and tell what they did; refusals are part of it."""

        def noted(rank: int) -> None:
            try:
                body(rank)
            except (ValueError, RuntimeError) as refusal:
                self.note(f"    refused: {type(refusal).__name__}: {refusal}")

        with _marks_noted(self):
            self.run(noted)
        return "".join(
            f"rank {rank}\n" + "".join(f"{line}\n" for line in lines)
            for rank, lines in self.lines.items()
        )


class _Places(threading.local, phases._Own):
    """A place for every rank, where one process has one."""


@contextlib.contextmanager
def _marks_noted(world: TracedWorld) -> Iterator[None]:
    mark, own = phases.mark, phases._own

    def noted(phase: str, microbatch: int | None = None) -> None:
        mark(phase, microbatch)
        world.note(f"  {phase}, microbatch {phases._own.microbatch}")

    phases.mark, phases._own = noted, _Places()
    try:
        yield
    finally:
        phases.mark, phases._own = mark, own
