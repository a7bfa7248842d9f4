# SPDX-License-Identifier: Apache-2.0
"""Predicted against measured steps of the digits model in many pairs of layouts.

First the ranks measure themselves (``job/calibration.py``), then they train in each pair, and with
the encoder forced onto the language model's layout. The last cell says how far predictions are off,
whether they put the pairs in the right order, and what the planner's first choice costs against
the best pair. The sizes have the published headline's proportions of work: the encoder has about a
twentieth of the language model's FLOPs.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.cases import Pair
from benchmarks.paths import rank_device
from benchmarks.wall_time import alternate
from examples.mimo.digits.data import SEQUENCE_LENGTH, VOCABULARY_SIZE, DigitsBatches
from examples.mimo.digits.images import PATCH_SIDE, TOKENS_PER_IMAGE
from megatron.core.models.mimo.job.calibration import Probe, calibrate
from megatron.core.models.mimo.plan.candidates import Candidate
from megatron.core.models.mimo.plan.estimates import estimate
from megatron.core.models.mimo.plan.machine import Machine
from megatron.core.models.mimo.plan.shapes import EncoderShape, LanguageShape, Shapes, Stack, Work
from mimo_colocated.launch.layouts import Layout
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
SIZE = ModelSize(vision_hidden=128, vision_layers=2, language_hidden=384, language_layers=4)
MEAN_ERROR, ORDER, FIRST_CHOICE = 0.15, 0.9, 0.05
_BATCH, _SEED, _IMAGES = 32, 1234, 4
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
    share = _IMAGES * TOKENS_PER_IMAGE / SEQUENCE_LENGTH
    shapes = Shapes(LanguageShape(language, VOCABULARY_SIZE), {"vision": encoder})
    return shapes, Work(SEQUENCE_LENGTH, _BATCH, {"vision": share}, itemsize=4)


def measure(pairs: tuple[Pair, ...], quick: bool) -> Iterator[dict[str, Any]]:
    """A cell per pair and variant, then one of all; on all ranks."""
    seconds = 0.2 if quick else 3.0
    machine = calibrate(_probe(seconds), "here")
    cells, seen = [], set()
    for pair in pairs or (DEFAULT[:2] if quick else DEFAULT):
        variants = ["colocated"]
        if str(pair.language) not in seen and pair.language.pp == 1:
            seen.add(str(pair.language))
            variants.append("homogeneous")
        for variant in variants:
            cells.append(_cell(pair, variant, machine, 2 * seconds))
            yield cells[-1]
    yield summary(cells)


def _probe(seconds: float) -> Probe:
    """What a rank of this model does: its tokens, its widths."""
    return Probe(
        rank_device(),
        torch.float32,
        tokens=_BATCH * SEQUENCE_LENGTH // dist.get_world_size(),
        width=SIZE.language_hidden,
        encoder_width=SIZE.vision_hidden,
        heads=SIZE.language_heads,
        seconds=seconds,
        ranks_of_node=dist.get_world_size(),
    )


def _cell(pair: Pair, variant: str, machine: Machine, seconds: float) -> dict[str, Any]:
    measured, predicted = _measured(pair, variant, seconds), predict(pair, variant, machine)
    return {
        "layout": str(pair) if variant == "colocated" else f"{pair.language}",
        "variant": variant,
        "measured_ms": round(measured * 1e3, 1),
        "predicted_ms": round(predicted * 1e3, 1),
        "error": round(predicted / measured - 1, 3),
        "passed": None,
    }


def _measured(pair: Pair, variant: str, seconds: float) -> float:
    vision: Layout | None = pair.vision
    options = ModelOptions(size=SIZE, seed=_SEED)
    if variant == "homogeneous":
        vision, options = None, ModelOptions(size=SIZE, seed=_SEED, bridge="gather")
    built = build_model(vision, pair.language, options)
    steps = {variant: _stepper(built)}
    dist.barrier()
    taken = alternate(steps, seconds)[variant]
    built.destroy()
    del built, steps
    end_threads_of_groups()
    return statistics.median(taken)


def _stepper(built: BuiltModel) -> Callable[[], None]:
    trainer = Trainer(built, TrainOptions(steps=1000, global_batch_size=_BATCH), True)
    batches, done = DigitsBatches(_SEED, "train", _BATCH), iter(range(1000))

    def step() -> None:
        trainer.step(batches, next(done))

    return step


def predict(pair: Pair, variant: str, machine: Machine) -> float:
    """Return the predicted seconds of a step.

    Args:
        pair: the layouts.
        variant: ``"colocated"`` or ``"homogeneous"``.
        machine: as calibrated.
    """
    shapes, work = model_shapes(SIZE)
    encoders = {"vision": pair.vision} if variant == "colocated" else {}
    candidate = Candidate(pair.language, encoders, 1)
    return estimate(candidate, shapes, work, machine).seconds.total


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
