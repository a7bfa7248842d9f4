# SPDX-License-Identifier: Apache-2.0
"""Cells of the study, and the sets of them: integers and texts alone.

A cell is a run. Its loss is set by rate and burst: a burst of 1 loses each packet by itself
(Bernoulli), a longer one in runs of that mean length at the same mean loss (Gilbert–Elliott).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

WORLD = 8
RESENT = "retransmitted"
GPT2, EASY_VQA = "gpt2", "easy-vqa"
NOWHERE, FORWARD, BACKWARD, GRADIENTS = "nowhere", "forward", "backward", "gradients"
# Steps of a run, and after how many of them held-out accuracy is looked at.
STEPS = {GPT2: (160, 20), EASY_VQA: (300, 300)}
SEEDS = (0, 1, 2)


@dataclass(frozen=True, order=True)
class Cell:
    """A run.

    Attributes:
        subject: what is trained.
        tp: TP size; DP is what is left of 8 ranks.
        where: packets are lost: in ``forward`` or ``backward`` over TP (and a bridge), in the
            reduction of ``gradients`` over DP, or ``nowhere``.
        rate: mean loss.
        burst: mean length of a run of losses, in packets; 1: each by itself.
        replacement: what stands in the place of a lost packet.
        steps: of training.
        seed: of weights, order of the data and losses.
    """

    subject: str
    tp: int
    where: str
    rate: float
    burst: int
    replacement: str
    steps: int
    seed: int

    @property
    def setting(self) -> tuple[Any, ...]:
        """All but the seed."""
        return tuple(asdict(self).values())[:-1]

    def __str__(self) -> str:
        head = f"{self.subject} tp{self.tp} {self.steps} steps"
        lost = f"{self.rate:.2%} in bursts of {self.burst} {self.replacement}"
        what = self.where if self.where == NOWHERE else f"{self.where} {lost}"
        return f"{head} {what} seed {self.seed}"


def lossless(subject: str, tp: int, steps: int) -> list[Cell]:
    """Return the runs that lose nothing."""
    return [Cell(subject, tp, NOWHERE, 0.0, 1, "zero", steps, seed) for seed in SEEDS]


def lossy(
    subject: str,
    tps: Iterable[int],
    wheres: Iterable[str],
    rates: Iterable[float],
    bursts: Iterable[int],
    replacements: Iterable[str],
    steps: int,
) -> Iterator[Cell]:
    """Yield every combination, with every seed."""
    axes = (tps, wheres, rates, bursts, replacements, SEEDS)
    for tp, where, rate, burst, replacement, seed in itertools.product(*axes):
        yield Cell(subject, tp, where, rate, burst, replacement, steps, seed)


def resent(tp: int, rate: float, steps: int) -> Iterator[Cell]:
    """Yield runs that send again what is lost: they train as without loss, and count the delay."""
    for burst in (1, 16):
        yield Cell(GPT2, tp, FORWARD, rate, burst, RESENT, steps, SEEDS[0])


def _tiny() -> Iterator[Cell]:
    steps = 60
    yield from lossless(GPT2, 2, steps)
    yield from lossy(GPT2, [2], [FORWARD, BACKWARD], [0.1], [1, 16], ["zero"], steps)
    yield from resent(2, 0.1, steps)


def _small() -> Iterator[Cell]:
    steps = STEPS[GPT2][0]
    both = [FORWARD, BACKWARD]
    for tp in (2, 4):
        yield from lossless(GPT2, tp, steps)
    yield from lossy(GPT2, [2], both, [0.01, 0.1], [1, 16], ["zero", "rescaled"], steps)
    yield from lossy(GPT2, [4], both, [0.1], [1, 16], ["zero"], steps)
    yield from lossy(GPT2, [2], [GRADIENTS], [0.1], [1], ["zero"], steps)
    yield from resent(2, 0.1, steps)


def _shipped() -> Iterator[Cell]:
    both, steps = [FORWARD, BACKWARD], STEPS[GPT2][0]
    for tp in (2, 4, 8):
        yield from lossless(GPT2, tp, steps)
    yield from lossy(GPT2, [4], both, [0.01, 0.1, 0.3], [1, 16], ["zero"], steps)
    yield from lossy(GPT2, [4], both, [0.1], [1, 16], ["stale", "rescaled"], steps)
    yield from lossy(GPT2, [4], both, [0.1], [4], ["zero"], steps)
    yield from lossy(GPT2, [2, 8], both, [0.1], [1], ["zero"], steps)
    yield from lossy(GPT2, [2], [GRADIENTS], [0.1, 0.3], [1], ["zero"], steps)
    yield from resent(4, 0.1, steps)
    vqa = STEPS[EASY_VQA][0]
    yield from lossless(EASY_VQA, 2, vqa)
    yield from lossy(EASY_VQA, [2], both, [0.1], [1], ["zero"], vqa)


SETS = {"tiny": _tiny, "small": _small, "shipped": _shipped}


def cells(name: str) -> list[Cell]:
    """Return a set, each cell once, in the order in which they run."""
    return list(dict.fromkeys(SETS[name]()))
