# SPDX-License-Identifier: Apache-2.0
"""Published steps of colocated and of homogeneous training, and the constants that explain them.

Rows of arXiv 2605.27678 on H100 nodes of 8: seconds of forward and backward passes, without the
optimizer. Four rows tell of eight steps. The model has five constants, of which each begins at
what is usual and may move as far as it usually differs; so a constant that the rows say little
about stays where it was, and leaving out a row changes the others little.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields

import numpy as np

from megatron.core.models.mimo.plan.candidates import VIRTUAL_STAGES, Candidate, problem
from megatron.core.models.mimo.plan.estimates import Estimate, estimate
from megatron.core.models.mimo.plan.machine import DATA_SHEETS, Machine, Reached, machine_of
from megatron.core.models.mimo.plan.shapes import EncoderShape, LanguageShape, Shapes, Stack, Work
from mimo_colocated.launch.layouts import Layout

# The paper names no shapes. 7B, 14B and the encoder of 1B have the named sizes and the memory of
# its rows; the others are those of Llama 3 70B, Qwen2.5 32B, CLIP-L and InternViT-6B, whose heads
# are as many as TP divides.
LANGUAGES = {
    "7B": LanguageShape(Stack.of(32, 4096, 11008, 32, gated=True), 32_000),
    "14B": LanguageShape(Stack.of(40, 5120, 13824, 40, gated=True), 152_064),
    "32B": LanguageShape(Stack(64, 5120, 27648, 40, 8, 128, gated=True), 152_064),
    "70B": LanguageShape(Stack(80, 8192, 28672, 64, 8, 128, gated=True), 128_256),
}
"""Size -> language model."""
_TOKENS = 256


def _encoder(layers: int, hidden: int, ffn: int, heads: int) -> EncoderShape:
    """Of items of 256 tokens, each of which is a row."""
    stack = Stack.of(layers, hidden, ffn, heads)
    return EncoderShape(
        stack, _TOKENS, _TOKENS, 588, hidden, projected=4096, sequence_parallel=True
    )


ENCODERS = {
    "0.3B": _encoder(24, 1024, 4096, 16),
    "1B": _encoder(24, 1792, 7168, 16),
    "6B": _encoder(45, 3200, 12800, 32),
}
"""Size -> encoder."""


@dataclass(frozen=True)
class Row:
    """A published row.

    Attributes:
        vision, language: their sizes, of :data:`ENCODERS` and of :data:`LANGUAGES`.
        share: part of the tokens that are rows of the encoder.
        sequence, ranks, samples, microbatches: of a step.
        homogeneous: the layout of both modules.
        encoder, colocated: the two layouts of the colocated step.
        gain: published, in percent.
        milliseconds: of the homogeneous and of the colocated step.
        gigabytes: of the fullest rank of either.
    """

    vision: str
    language: str
    share: float
    sequence: int
    ranks: int
    samples: int
    microbatches: int
    homogeneous: str
    encoder: str
    colocated: str
    gain: float
    milliseconds: tuple[float, float]
    gigabytes: tuple[float, float]

    def __str__(self) -> str:
        model, share = f"{self.vision}+{self.language}", f"{100 * self.share:.0f} %"
        return f"{model}, {self.sequence // 1024}K, {share}, {self.ranks}"

    @property
    def shapes(self) -> Shapes:
        """The model."""
        return Shapes(LANGUAGES[self.language], {"vision": ENCODERS[self.vision]})

    @property
    def work(self) -> Work:
        """The step."""
        return Work(self.sequence, self.samples, {"vision": self.share})

    def estimates(
        self, machine: Machine, virtual: Sequence[int] = VIRTUAL_STAGES
    ) -> tuple[Estimate, Estimate]:
        """Return those of the homogeneous and of the colocated step.

        The paper does not say how many virtual stages a pipeline has; a tuned one has those that
        are fastest.

        Args:
            machine: where.
            virtual: numbers of stages of a rank to choose from.
        """
        encoder = {"vision": Layout.parse(self.encoder, "vision")}
        one = self._fastest(self.homogeneous, {}, machine, virtual)
        return one, self._fastest(self.colocated, encoder, machine, virtual)

    def _fastest(
        self, layout: str, encoders: dict[str, Layout], machine: Machine, virtual: Sequence[int]
    ) -> Estimate:
        language = Layout.parse(layout, "language")
        tried = [
            Candidate(language, encoders, self.microbatches, count)
            for count in (virtual if language.pp > 1 else (1,))
        ]
        # Stages that interleave need whole rounds of microbatches; without them there is one.
        runs = [each for each in tried if problem(each, self.shapes, self.work) is None]
        every = [
            estimate(each, self.shapes, self.work, machine)
            for each in runs or [Candidate(language, encoders, self.microbatches)]
        ]
        return min(every, key=lambda each: each.seconds.passes)


ROWS = (
    Row("1B", "7B", 0.75, 16_384, 16, 8, 2, "tp=2,cp=2,dp=4", "tp=1,dp=16", "tp=2,cp=2,dp=4",
        8.5, (1352, 1248), (59.6, 52.2)),
    Row("1B", "7B", 0.75, 65_536, 32, 4, 2, "tp=4,cp=8,dp=1", "tp=1,dp=32", "tp=2,cp=8,dp=2",
        49.3, (4457, 2973), (68.9, 50.3)),
    Row("1B", "14B", 0.75, 32_768, 32, 4, 1, "tp=8,cp=2,dp=2", "tp=2,dp=16", "tp=4,cp=2,dp=4",
        21.3, (1962, 1585), (53.5, 70.3)),
    Row("1B", "14B", 0.75, 131_072, 64, 4, 2, "tp=4,cp=8,pp=2,dp=1", "tp=2,dp=32", "tp=4,cp=8,dp=2",
        34.0, (9692, 7175), (55.8, 62.9)),
)  # fmt: skip

def rows_from(values: object) -> tuple[Row, ...]:
    """Return further rows, from a list of mappings of their fields.

    Raises:
        ValueError: no list of mappings, fields that are missing or unknown, or an unknown size.
    """
    known = {each.name for each in fields(Row)}
    if not isinstance(values, list):
        raise ValueError(f"rows must be a list of mappings with {sorted(known)}, got {values!r}")
    for each in values:
        if not isinstance(each, dict) or set(each) != known:
            raise ValueError(f"a row's fields must be {sorted(known)}, got {each!r}")
        for name, sizes in (("vision", ENCODERS), ("language", LANGUAGES)):
            if each[name] not in sizes:
                raise ValueError(f"{name} must be one of {sorted(sizes)}, got {each[name]!r}")
    return tuple(Row(**each) for each in values)


# What training usually reaches on H100, before any row is seen, and the standard deviation of its
# logarithm. Matmul and attention: Megatron-Core's and FlashAttention's published runs; encoder: as
# narrower products do; inside: all-gathers of nccl-tests; between: 400 Gb/s less protocol.
USUAL = Reached(matmul=0.5, attention=0.4, encoder=0.35, inside=0.65, between=0.9)
_SPREAD = np.array([0.3, 0.3, 0.4, 0.3, 0.2])
# Of a published time: what runs of one configuration differ by.
_NOISE = 0.03


def fit(rows: Sequence[Row]) -> Reached:
    """Return the constants under which the rows and what is usual are most likely together.

    Args:
        rows: any of :data:`ROWS`.
    """
    usual = np.log(astuple(USUAL))
    at = usual.copy()
    for _ in range(12):
        # Gauss and Newton's steps; the model is smooth but for overlaps that begin or end.
        wrong = _misfit(at, usual, rows)
        slope = np.stack(
            [(_misfit(at + step, usual, rows) - wrong) / 1e-4 for step in np.eye(at.size) * 1e-4],
            axis=1,
        )
        at = at - 0.7 * np.linalg.lstsq(slope, wrong, rcond=None)[0]
    return Reached(*np.exp(at).tolist())


def _misfit(logs: np.ndarray, usual: np.ndarray, rows: Sequence[Row]) -> np.ndarray:
    """How far times and constants are off, each in units of its own deviation."""
    machine = h100(Reached(*np.exp(logs).tolist()))
    times = [
        np.log(each.seconds.passes * 1000 / published) / _NOISE
        for row in rows
        for each, published in zip(row.estimates(machine), row.milliseconds, strict=True)
    ]
    return np.concatenate([times, (logs - usual) / _SPREAD])


def h100(reached: Reached) -> Machine:
    """Return an H100 node that reaches these parts of its data sheet."""
    return machine_of("h100", DATA_SHEETS["h100"], reached)
