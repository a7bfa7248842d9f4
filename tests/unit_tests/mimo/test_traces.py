# SPDX-License-Identifier: Apache-2.0
"""Phases, collectives and refusals of every rank are those that are checked in, line by line.

Moves of code that claim to change nothing are held against these texts. Where a change is meant,
``MIMO_WRITE_TRACES=1 pytest tests/unit_tests/mimo/test_traces.py`` writes them anew: read the diff.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.core.models.mimo import MimoModel
from megatron.core.models.mimo.comm import gather_bridge
from tests.unit_tests.mimo import test_routed_model as one_stage
from tests.unit_tests.mimo import test_stage_side as stages
from tests.unit_tests.mimo.test_encode_ahead import ahead
from tests.unit_tests.mimo.traces import TracedWorld

FOLDER = Path(__file__).with_name("traces")
FAN_IN = ((1, 4), (1, 2, 2))


def forward(**options: Any) -> one_stage.Case:
    """Four encoder replicas beside two language replicas of CP 2, two images in every sample."""
    settings = {"images": [2] * 4, "encoded": [2] * 4, **options}
    return one_stage.Case(*FAN_IN, **settings)


def packed(**options: Any) -> one_stage.Case:
    """One row of three packed samples per language replica."""
    return forward(images=[2, 2], encoded=[1] * 4, packed=[0, 4, 8, 16], **options)


ONE_STAGE = {
    "plain": forward(),
    "plan_ahead": forward(ahead=True),
    "packed": packed(),
    "packed_plan_ahead": packed(ahead=True),
    "frozen": forward(frozen=True),
    "empty": forward(images=[0] * 4, encoded=[0] * 4),
    "empty_overlap": forward(images=[0] * 4, encoded=[0] * 4, overlap=True),
    "empty_replica": forward(images=[2, 2, 0, 0], encoded=[2, 2, 0, 0]),
    "balanced": forward(images=[4, 2, 1, 1], encoded=[5, 1, 1, 1], balanced=True),
    "inputs_missing": forward(change=one_stage.drop_images),
    "wrong_count": forward(encoded=[1, 1, 2, 2]),
    "odd_length": forward(change=one_stage.odd_length),
    "plan_of_other_places": forward(ahead=True, change=one_stage.shift_tokens),
}

# Of three microbatches, the second one of text only.
DATA = {
    "images": ([2, 0, 1, 3], [0, 0, 0, 0], [1, 1, 0, 0]),
    "sounds": ([0, 2, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]),
}
Body = Callable[[stages.Case, int, MimoModel], Any]


def evaluate(case: stages.Case, rank: int, model: MimoModel) -> None:
    """Three microbatches without gradients."""
    with torch.no_grad():
        batches = [case.inputs(rank, microbatch) for microbatch in range(3)]
        assert len(model.encode_microbatches(batches).microbatches) == len(batches)


def problem_on_rank_1(case: stages.Case, rank: int, model: MimoModel) -> None:
    """The loader of rank 1 has nothing left."""
    batches = [case.inputs(rank, microbatch) for microbatch in range(2)]
    model.encode_microbatches(batches, "out of images" if rank == 1 else None)


def whole_model(case: stages.Case, rank: int, model: MimoModel) -> None:
    """Forward and backward of a first and of a text-only microbatch without stages."""
    for microbatch in (0, 1):
        output, _ = model(**case.inputs(rank, microbatch))
        output.sum().backward()


TWO_STAGES = stages.Case((1, 4), (1, 2, 2, 1), **DATA)
PIPELINED: dict[str, tuple[stages.Case, Body]] = {
    "plain": (TWO_STAGES, stages.step),
    "frozen": (replace(TWO_STAGES, frozen=True), stages.step),
    "two_encoders": (replace(TWO_STAGES, hears=(2, 2)), stages.step),
    "evaluation": (TWO_STAGES, evaluate),
    "problem": (TWO_STAGES, problem_on_rank_1),
    "forward_refused": (TWO_STAGES, whole_model),
}
ONE_STAGE_TWO_ENCODERS = stages.Case((1, 4), (1, 4, 1, 1), hears=(2, 2), **DATA)


def over(case: stages.Case, bridge: str) -> stages.Case:
    """The case over a bridge; one replica gathers from one, whose rows need not be equally many."""
    if bridge == "routed":
        return case
    whole = (case.size, 1)
    hears = case.hears and whole
    return replace(
        case, src=whole, hears=hears, options={"bridge": bridge}, dims=("tp", "cp", "pp", "dp")
    )


def staged(case: stages.Case, body: Body) -> str:
    """The trace of a step in stages."""

    def on_rank(rank: int) -> None:
        model, _ = case.build(rank)
        body(case, rank, model)

    return TracedWorld(case.size).text(on_rank)


def traces() -> dict[str, Callable[[], str]]:
    """Name -> what makes its text."""
    found: dict[str, Callable[[], str]] = {}
    replicas = stages.Case((1, 8), (1, 2, 2, 2), **DATA)
    found["routed_stages_replicas"] = lambda: staged(replicas, stages.step)
    for bridge in ("gather", "routed"):
        for name, case in ONE_STAGE.items():
            case = replace(case, bridge=bridge)
            if bridge == "gather" and case.ahead:
                case = replace(case, ahead=False, change=one_stage.empty_plan)
            found[f"{bridge}_{name}"] = lambda c=case: TracedWorld(c.size).text(c._on_rank)
        for name, (shape, body) in PIPELINED.items():
            case = over(shape, bridge)
            found[f"{bridge}_stages_{name}"] = lambda c=case, b=body: staged(c, b)
        case = over(ONE_STAGE_TWO_ENCODERS, bridge)
        found[f"{bridge}_two_encoders"] = lambda c=case: staged(c, whole_model)
        found[f"{bridge}_two_encoders_ahead"] = lambda c=case: staged(c, ahead(1))
    return found


TRACES = traces()


@pytest.mark.parametrize("name", list(TRACES))
def test_a_rank_does_what_is_written_down(name):
    text, file = TRACES[name](), FOLDER / f"{name}.txt"
    if os.environ.get("MIMO_WRITE_TRACES"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    assert text.splitlines() == file.read_text().splitlines()


def test_every_text_belongs_to_a_case():
    assert {file.stem for file in FOLDER.glob("*.txt")} == set(TRACES)


def test_a_skipped_sum_is_noticed(monkeypatch):
    """The control: without the sum over CP ranks the gather bridge's backward is another text."""
    monkeypatch.setattr(gather_bridge, "sum_gradients", lambda tensor, group: tensor)
    text = TRACES["gather_plain"]()
    assert text != (FOLDER / "gather_plain.txt").read_text()
