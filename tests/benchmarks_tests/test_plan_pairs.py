# SPDX-License-Identifier: Apache-2.0
"""What is planned is the model that is measured; verdicts of predictions."""

from __future__ import annotations

import pytest

from benchmarks import plan_pairs
from benchmarks.plan_pairs import DEFAULT, SIZE, model_shapes, predict, rank_correlation, summary
from megatron.core.models.mimo.plan.flops import encoder_flops, language_flops
from megatron.core.models.mimo.plan.machine import PRESETS


def cell(measured: float, predicted: float) -> dict:
    error = predicted / measured - 1
    return {"measured_ms": measured, "predicted_ms": predicted, "error": error}


def test_verdicts() -> None:
    good = [cell(100, 110), cell(200, 190), cell(300, 310)]
    assert summary(good)["passed"]
    assert not summary([*good, cell(50, 400)])["passed"]
    # In the right order and near, but the first choice is not the best.
    chosen = summary([cell(100, 108), cell(110, 107), *[cell(n, n) for n in range(200, 220)]])
    assert not chosen["passed"]
    assert "first choice +10.0 % to the best" in chosen["variant"]


def test_order() -> None:
    assert rank_correlation([1, 2, 3, 4], [1, 2, 3, 4]) == 1
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == -1
    assert rank_correlation([1], [2]) == 1


@pytest.mark.parametrize("pair", DEFAULT, ids=str)
def test_every_pair_can_be_predicted(pair) -> None:
    assert pair.world_size == 8
    once, repeated = (
        predict(pair, variant, PRESETS["h100"]) for variant in ("colocated", "homogeneous")
    )
    assert once.total > 0
    assert repeated.total > 0


def test_proportions_of_work_are_the_published_ones() -> None:
    """An encoder of about a twentieth of the language model, as 1B beside 7B at 64K tokens."""
    shapes, work = model_shapes(SIZE)
    items = work.items("vision", shapes.encoders["vision"])
    assert items == 64
    vision = encoder_flops(shapes.encoders["vision"], items, shapes.width).forward
    language = language_flops(shapes.language, [work.sequence]).forward
    assert 0.03 < vision / language < 0.08
    assert len(DEFAULT) == 16
    assert plan_pairs.ORDER == 0.9
