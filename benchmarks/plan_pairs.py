# SPDX-License-Identifier: Apache-2.0
"""Predicted against measured steps of a scaled-down model in many pairs of layouts.

First the ranks measure themselves (``job/calibration.py``), then they train in each pair, and with
the encoder forced onto the language model's layout; both take turns. The last cells say how far
predictions are off, whether they put the runs in the right order, what the planner's first choice
costs against the best run, and what colocation gains in the published headline's shape: language
CP 8, encoder DP 8. The sizes have that row's proportions of work: the encoder has about a twentieth
of the language model's FLOPs. Samples are those of the digits, many of them joined to one sequence.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.cases import Pair
from benchmarks.paths import rank_device
from benchmarks.published import ROWS
from benchmarks.wall_time import alternate
from examples.mimo.digits.data import (
    DIGITS_PER_SAMPLE,
    SEQUENCE_LENGTH,
    VOCABULARY_SIZE,
    Batch,
    DigitsBatches,
)
from examples.mimo.digits.images import PATCH_SIDE, TOKENS_PER_IMAGE
from megatron.core.models.mimo.job.calibration import Probe, calibrate
from megatron.core.models.mimo.plan.candidates import Candidate
from megatron.core.models.mimo.plan.estimates import estimate
from megatron.core.models.mimo.plan.machine import Machine
from megatron.core.models.mimo.plan.shapes import EncoderShape, LanguageShape, Shapes, Stack, Work
from megatron.core.models.mimo.plan.step_time import StepSeconds
from tests.harness.garbage import end_threads_of_groups
from tests.models.model import BuiltModel, ModelOptions, ModelSize, build_model
from tests.models.trainer import Trainer, TrainOptions

DEFAULT = tuple(
    Pair.parse(text)
    for text in (
        "tp=1,dp=8/tp=1,cp=8,dp=1", "tp=2,dp=4/tp=1,cp=8,dp=1", "tp=8,dp=1/tp=1,cp=8,dp=1",
        "tp=1,dp=8/tp=1,cp=4,dp=2", "tp=2,dp=4/tp=1,cp=4,dp=2", "tp=4,dp=2/tp=1,cp=4,dp=2",
        "tp=1,dp=8/tp=1,cp=2,dp=4", "tp=4,dp=2/tp=1,cp=2,dp=4", "tp=1,dp=8/tp=1,dp=8",
        "tp=2,dp=4/tp=1,dp=8", "tp=1,dp=8/tp=2,cp=4,dp=1", "tp=2,dp=4/tp=2,cp=2,dp=2",
        "tp=1,dp=8/tp=2,dp=4", "tp=4,dp=2/tp=4,dp=2", "tp=1,dp=8/tp=4,cp=2,dp=1",
        "tp=1,dp=8/tp=8,dp=1",
    )
)  # fmt: skip
SIZE = ModelSize(vision_hidden=128, vision_layers=1, language_hidden=256, language_layers=4)
MEAN_ERROR, ORDER, FIRST_CHOICE = 0.15, 0.9, 0.05
HEADLINE = DEFAULT[0]
# Samples of a step, and those of the digits that are joined to one of them.
_SAMPLES, _JOINED, _SEED = 8, 16, 1234
_LENGTH = _JOINED * SEQUENCE_LENGTH
_HOMOGENEOUS, _COLOCATED = "homogeneous", "colocated"
COLUMNS = {
    "layout": "layout (encoder/language)",
    "variant": "",
    "measured_ms": "measured ms",
    "predicted_ms": "predicted ms",
    "error": "error",
}


def model_shapes(size: ModelSize) -> tuple[Shapes, Work]:
    """Return the digits model and a step of it, as the planner sees them."""
    vision = Stack.of(
        size.vision_layers, size.vision_hidden, 4 * size.vision_hidden, size.vision_heads
    )
    wide = size.language_hidden
    language = Stack.of(
        size.language_layers, wide, 2 * wide, size.language_heads, gated=True
    )
    encoder = EncoderShape(
        vision, TOKENS_PER_IMAGE, TOKENS_PER_IMAGE, PATCH_SIDE**2, size.vision_hidden, wide
    )
    share = DIGITS_PER_SAMPLE * TOKENS_PER_IMAGE / SEQUENCE_LENGTH
    shapes = Shapes(LanguageShape(language, VOCABULARY_SIZE), {"vision": encoder})
    return shapes, Work(_LENGTH, _SAMPLES, {"vision": share}, itemsize=4)


class LongSamples(DigitsBatches):
    """Samples of the digits, many of them end to end in one sequence."""

    def local_batch(
        self, step: int, microbatch: int, count: int, parts: Mapping[str, tuple[int, int]]
    ) -> Batch:
        """As of the digits, with longer sequences."""
        batch = super().local_batch(step, microbatch, count, parts)
        names = ("input_ids", "labels", "loss_mask")
        longer = {name: getattr(batch, name).reshape(-1, _LENGTH) for name in names}
        positions = torch.arange(_LENGTH).expand(len(longer["input_ids"]), -1)
        return replace(batch, **longer, position_ids=positions)

    def tokens(self, token: int, step: int, microbatch: int, count: int) -> np.ndarray:
        """As of the digits, bool ``(samples, length)``."""
        return super().tokens(token, step, microbatch, count).reshape(-1, _LENGTH)


def measure(pairs: tuple[Pair, ...], quick: bool) -> Iterator[dict[str, Any]]:
    """A cell per pair and variant, then one of all, and one of the headline; on all ranks."""
    machine = calibrate(_probe(0.2 if quick else 3.0), "here")
    cells, seen = [], set()
    for pair in pairs or (DEFAULT[:2] if quick else DEFAULT):
        variants = [_COLOCATED]
        if str(pair.language) not in seen and pair.language.pp == 1:
            seen.add(str(pair.language))
            variants.append(_HOMOGENEOUS)
        for variant, measured in _measured(pair, variants, 1.0 if quick else 8.0).items():
            cells.append(_cell(pair, variant, measured, machine))
            yield cells[-1]
    yield summary(cells) | {"machine": asdict(machine)}
    if str(HEADLINE) in [cell["layout"] for cell in cells]:
        yield headline(cells)


def _probe(seconds: float) -> Probe:
    """What a rank of this model does: its tokens, its widths."""
    return Probe(
        rank_device(),
        torch.float32,
        tokens=_SAMPLES * _LENGTH // dist.get_world_size(),
        width=SIZE.language_hidden,
        encoder_width=SIZE.vision_hidden,
        heads=SIZE.language_heads,
        item_tokens=TOKENS_PER_IMAGE,
        seconds=seconds,
        ranks_of_node=dist.get_world_size(),
    )


def _cell(pair: Pair, variant: str, measured: float, machine: Machine) -> dict[str, Any]:
    parts = predict(pair, variant, machine)
    return {
        "layout": str(pair) if variant == _COLOCATED else f"{pair.language}",
        "variant": variant,
        "measured_ms": round(measured * 1e3, 1),
        "predicted_ms": round(parts.total * 1e3, 1),
        "error": round(parts.total / measured - 1, 3),
        "parts_ms": {name: round(1e3 * value, 1) for name, value in vars(parts).items() if value},
        "passed": None,
    }


def _measured(pair: Pair, variants: Sequence[str], seconds: float) -> dict[str, float]:
    """Seconds of a step of each variant, which take turns."""
    built = [_built(pair, variant) for variant in variants]
    steps = {name: _stepper(each) for name, each in zip(variants, built, strict=True)}
    dist.barrier()
    taken = alternate(steps, seconds, (3, 50))
    for each in built:
        each.destroy()
    del built, steps
    end_threads_of_groups()
    return {name: statistics.median(times) for name, times in taken.items()}


def _built(pair: Pair, variant: str) -> BuiltModel:
    # As planned: TP ranks cut the language model's norms, too.
    options = ModelOptions(size=SIZE, seed=_SEED, sequence_parallel=True)
    if variant == _HOMOGENEOUS:
        return build_model(None, pair.language, replace(options, bridge="gather"))
    return build_model(pair.vision, pair.language, options)


def _stepper(built: BuiltModel) -> Callable[[], None]:
    count = _SAMPLES * _JOINED
    trainer = Trainer(built, TrainOptions(steps=1000, global_batch_size=count), True)
    batches, done = LongSamples(_SEED, "train", count), iter(range(1000))

    def step() -> None:
        trainer.step(batches, next(done))

    return step


def predict(pair: Pair, variant: str, machine: Machine) -> StepSeconds:
    """Return the predicted seconds of a step, part by part.

    Args:
        pair: the layouts.
        variant: ``"colocated"`` or ``"homogeneous"``.
        machine: as calibrated.
    """
    shapes, work = model_shapes(SIZE)
    encoders = {"vision": pair.vision} if variant == _COLOCATED else {}
    candidate = Candidate(pair.language, encoders, 1)
    return estimate(candidate, shapes, work, machine).seconds


def summary(cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the last cell: mean error, order, and what the first choice costs."""
    error = statistics.mean(abs(cell["error"]) for cell in cells)
    measured = [cell["measured_ms"] for cell in cells]
    predicted = [cell["predicted_ms"] for cell in cells]
    order = rank_correlation(measured, predicted)
    first = measured[predicted.index(min(predicted))] / min(measured) - 1
    return {
        "layout": f"{len(cells)} runs",
        "variant": f"order {order:.2f}, first choice {100 * first:+.1f} % to the best",
        "measured_ms": None,
        "predicted_ms": None,
        "error": round(error, 3),
        "passed": error <= MEAN_ERROR and order >= ORDER and first <= FIRST_CHOICE,
    }


def headline(cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what colocation gains in the headline's shape: measured, predicted, published."""
    alike = [cell for cell in cells if cell["layout"] in (str(HEADLINE), str(HEADLINE.language))]
    both = {cell["variant"]: cell for cell in alike}
    measured, predicted = (
        both[_HOMOGENEOUS][name] / both[_COLOCATED][name]
        for name in ("measured_ms", "predicted_ms")
    )
    published = max(ROWS, key=lambda row: row.gain)
    said = 1 + published.gain / 100
    return {
        "layout": f"the headline's shape, {HEADLINE}",
        "variant": f"homogeneous over colocated: measured {measured:.2f}, predicted "
        f"{predicted:.2f}, published {said:.2f}",
        "measured_ms": None,
        "predicted_ms": None,
        "error": round(predicted / measured - 1, 3),
        "passed": None,
    }


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Return Spearman's coefficient: 1 for the same order, -1 for the opposite one.

    >>> rank_correlation([1, 2, 3], [10, 30, 20]), rank_correlation([1, 2], [1, 2])
    (0.5, 1.0)
    """
    places = [[sorted(values).index(value) for value in values] for values in (one, other)]
    count = len(one)
    if count < 2:
        return 1.0
    apart = sum((a - b) ** 2 for a, b in zip(*places, strict=True))
    return 1 - 6 * apart / (count * (count**2 - 1))
