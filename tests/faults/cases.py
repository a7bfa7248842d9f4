# SPDX-License-Identifier: Apache-2.0
"""What happens to whom: layouts, faults, and how cases are drawn. No torch."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mimo_colocated import phases
from tests.faults.journal import Control

ANY = "any moment"
"""In place of a phase: a fault at a random time of the run, whatever the rank does then."""
SIGNALS = ("SIGKILL", "SIGSTOP", "SIGTERM")
FULL, BROKEN = "full disk", "broken disk"
WRITES = {
    FULL: r"the disk is full \(No space left on device\); make room there and resume",
    BROKEN: r"(OSError: )?\[Errno 5\] Input/output error",
}
"""Faults of a rank that saves, and what the error says of them."""
APART = "own folder"
"""Ranks 4-7 have another folder of checkpoints, like a node with a disk of its own."""
FAULTS = (*SIGNALS, *WRITES, APART)


@dataclass(frozen=True)
class Layout:
    """A job that faults happen to.

    Attributes:
        name: of the layout.
        arguments: of the job.
    """

    name: str
    arguments: str


LAYOUTS = (
    Layout("fan-in", "--vision tp=2,dp=4 --language tp=2,cp=2,dp=2"),
    Layout(
        "fan-out",
        "--vision tp=4,dp=2 --language tp=1,cp=2,dp=4 --no-overlap-grad-reduce "
        "--no-distributed-optimizer",
    ),
    Layout("gather", "--vision tp=2,dp=4 --language tp=2,cp=2,dp=2 --bridge gather"),
    Layout(
        "stages",
        "--vision tp=1,dp=8 --language tp=1,cp=2,pp=2,dp=2 --micro-batches 2 --encode-ahead 1",
    ),
    Layout(
        "experts",
        "--vision tp=4,dp=2 --language tp=2,cp=2,dp=2,ep=2 --experts 4 --sequence-parallel",
    ),
    # Samples without images, without sounds or with one digit only: some ranks encode nothing.
    Layout(
        "two encoders",
        "--vision tp=2,dp=4 --audio tp=1,dp=8 --language tp=2,cp=2,dp=2 --varied-samples "
        "--sequence-parallel",
    ),
)
STEPS, SAVE_EVERY = 4, 2
COMMON = f"--steps {STEPS} --save-every {SAVE_EVERY} --global-batch-size 16 --eval-batch-size 400"


@dataclass(frozen=True)
class Case:
    """One fault.

    Attributes:
        number: of the case, from 1.
        layout: name of the layout.
        signal: one of :data:`FAULTS`.
        rank: that it is sent to.
        phase: in which; :data:`ANY` for a random time of the run.
        entry: at which entry of the phase, from 1.
        delay: seconds after that, or after the rank's start.
    """

    number: int
    layout: str
    signal: str
    rank: int
    phase: str
    entry: int
    delay: float

    @property
    def resumes(self) -> bool:
        """Whether the job has to find a checkpoint."""
        return self.phase == phases.LOAD

    @property
    def loses_a_rank(self) -> bool:
        """Whether a rank is gone without a word, so that others wait for it."""
        return self.signal in ("SIGKILL", "SIGSTOP")

    def words(self) -> str:
        """The case in a few words."""
        where = self.phase if self.phase in (ANY, phases.START) else f"{self.phase} #{self.entry}"
        return f"{self.signal} rank {self.rank}, {where} +{self.delay * 1e3:.0f} ms"


def draw(count: int, seed: int, controls: dict[str, Control]) -> list[Case]:
    """Cases in turn over phases and signals; layout, rank and moment are random.

    Args:
        count: of cases.
        seed: of the draw.
        controls: layout -> what its ranks did in a run without faults.
    """
    chance = random.Random(seed)
    kinds = _kinds(chance, sorted({p for c in controls.values() for p in c.phases()}))
    return [_draw_one(number, *next(kinds), chance, controls) for number in range(1, count + 1)]


def _kinds(chance: random.Random, known: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Every (phase, signal) and every fault of a save, shuffled; again and again."""
    every = [(phase, signal) for phase in (*known, phases.START, ANY) for signal in SIGNALS]
    every += [(phases.SAVE, fault) for fault in WRITES if phases.SAVE in known]
    every.append((phases.START, APART))
    while True:
        yield from chance.sample(every, len(every))


def _draw_one(
    number: int, phase: str, signal: str, chance: random.Random, controls: dict[str, Control]
) -> Case:
    fits = sorted(n for n, c in controls.items() if phase in (ANY, phases.START, *c.phases()))
    layout = chance.choice(fits)
    control = controls[layout]
    if signal == APART:
        return Case(number, layout, signal, 4, phase, 0, 0.0)
    if phase in (ANY, phases.START):
        rank = chance.choice(control.ranks())
        start, end = control.span(rank, phase)
        return Case(number, layout, signal, rank, phase, 0, chance.uniform(start, end))
    rank = chance.choice([r for r in control.ranks() if control.entries(r, phase)])
    entry = chance.randint(1, control.entries(rank, phase))
    # Half of the cases at once, half somewhere in the middle; writes all fail from the first.
    longest = 0.0 if signal in WRITES else control.seconds(rank, phase)
    delay = chance.choice([0.0, chance.uniform(0, longest)])
    return Case(number, layout, signal, rank, phase, entry, delay)
