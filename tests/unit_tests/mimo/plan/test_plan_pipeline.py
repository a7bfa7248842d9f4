# SPDX-License-Identifier: Apache-2.0
"""The formula of a pipelined step against the schedule played event by event."""

from __future__ import annotations

import itertools

import pytest

from megatron.core.models.mimo.plan.pipeline import Passes, pipeline_seconds

# Nothing of Megatron-Core is in them.
pytestmark = pytest.mark.once


def played(passes: Passes, microbatches: int, stages: int) -> float:
    """Seconds of the schedule, every pass beginning when what it needs is there."""
    orders = [_order(stage, microbatches, stages) for stage in range(stages)]
    ended: dict[tuple[str, int, int], float] = {}
    clock, left = [0.0] * stages, sum(len(order) for order in orders)
    while left:
        for stage, order in enumerate(orders):
            while order and (needs := _needs(*order[0], stage, stages)) in {None, *ended}:
                kind, number = order.pop(0)
                start = max(clock[stage], ended.get(needs, 0.0) if needs else 0.0)
                clock[stage] = start + _seconds(passes, kind, stage, stages)
                ended[kind, number, stage] = clock[stage]
                left -= 1
    return max(clock)


def _order(stage: int, microbatches: int, stages: int) -> list[tuple[str, int]]:
    first = min(microbatches, stages - 1 - stage)
    order = [("forward", n) for n in range(first)]
    for n in range(microbatches - first):
        order += [("forward", first + n), ("backward", n)]
    return order + [("backward", n) for n in range(microbatches - first, microbatches)]


def _needs(kind: str, number: int, stage: int, stages: int) -> tuple[str, int, int] | None:
    if kind == "forward":
        return ("forward", number, stage - 1) if stage else None
    return ("backward", number, stage + 1) if stage < stages - 1 else ("forward", number, stage)


def _seconds(passes: Passes, kind: str, stage: int, stages: int) -> float:
    seconds = getattr(passes, kind)
    seconds += getattr(passes, f"first_{kind}") if stage == 0 else 0.0
    return seconds + (getattr(passes, f"last_{kind}") if stage == stages - 1 else 0.0)


SIZES = list(itertools.product((1, 2, 3, 4, 8, 16), (1, 2, 4, 8)))


@pytest.mark.parametrize(("microbatches", "stages"), SIZES)
def test_equal_stages(microbatches: int, stages: int) -> None:
    passes = Passes(1.0, 2.0)
    assert pipeline_seconds(passes, microbatches, stages, 1) == pytest.approx(
        played(passes, microbatches, stages)
    )


@pytest.mark.parametrize("extra", [0.1, 0.5, 1.0])
@pytest.mark.parametrize(("microbatches", "stages"), SIZES)
def test_an_encoder_on_the_first_stage(microbatches: int, stages: int, extra: float) -> None:
    """Exactly, as long as the encoder takes no longer than its stage."""
    passes = Passes(1.0, 2.0, first_forward=extra, first_backward=2 * extra)
    assert pipeline_seconds(passes, microbatches, stages, 1) == pytest.approx(
        played(passes, microbatches, stages)
    )


@pytest.mark.parametrize("extra", [0.1, 0.3])
@pytest.mark.parametrize(("microbatches", "stages"), SIZES)
def test_an_output_layer_on_the_last_stage(microbatches: int, stages: int, extra: float) -> None:
    """Within 5 %: what waits for the last stage is spread over the others."""
    passes = Passes(1.0, 2.0, 0.2, 0.4, last_forward=extra, last_backward=2 * extra)
    assert pipeline_seconds(passes, microbatches, stages, 1) == pytest.approx(
        played(passes, microbatches, stages), rel=0.05
    )


def test_an_encoder_is_not_simply_added() -> None:
    """The control: some of it runs while its stage would have waited."""
    passes = Passes(1.0, 2.0, first_forward=0.5, first_backward=1.0)
    added = pipeline_seconds(Passes(1.0, 2.0), 2, 2, 1) + 2 * 1.5
    assert played(passes, 2, 2) == pipeline_seconds(passes, 2, 2, 1) == added - 1.5


def test_virtual_stages_shorten_the_waiting_alone() -> None:
    passes = Passes(1.0, 2.0)
    whole = [pipeline_seconds(passes, 8, 4, virtual) for virtual in (1, 3)]
    assert whole == [24 + 9, 24 + 3]
