# SPDX-License-Identifier: Apache-2.0
"""Encoders in the bubbles of 1F1B on 8 ranks: the same gradients, to the last bit.

The oracle is the same model that encodes all microbatches first, which ``test_pipeline_step_8rank``
compares with one process. What the bubbles hold is in ``test_bubbles``.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from examples.mimo.digits.data import Batch, Token
from megatron.core.models.mimo.comm.plan.routes import plan_routes
from megatron.core.models.mimo.comm.plan.token_runs import TokenRuns, split_items
from megatron.core.models.mimo.model import stages
from megatron.core.models.mimo.model.later import LaterMicrobatches
from megatron.core.models.mimo.model.routed_path import RoutedPath
from megatron.core.utils import unwrap_model
from tests.models.model import VISION, ModelOptions
from tests.models.trainer import Trainer
from tests.unit_tests.mimo.test_pipeline_step_8rank import (
    MIXED,
    OPTIONS,
    TEXT_ONLY,
    Model,
    Result,
    local,
    microbatches,
    model,
    reading,
)

pytestmark = pytest.mark.ranks(8, timeout=120)

# Some windows of these are empty: the first part of the step, or all that is left for bubbles.
LATE_IMAGES = ([0, 0, 0, 0],) * 4 + ([0, 1, 1, 0], [1, 0, 0, 1])
EARLY_IMAGES = LATE_IMAGES[::-1]


@dataclass(frozen=True)
class Pipe:
    """A model with stages."""

    language: str
    vision: str = "tp=1,dp=8"
    options: dict[str, Any] = field(default_factory=dict)


PIPES = {
    "pp2_trains": Pipe("tp=1,cp=2,pp=2,dp=2"),
    "pp2_frozen": Pipe("tp=1,cp=2,pp=2,dp=2", options={"freeze": "encoder+projector"}),
    "pp4_tp2_projector_trains": Pipe(
        "tp=1,cp=2,pp=4,dp=1", "tp=2,dp=4", {"freeze": "encoder", "overlap_grad_reduce": False}
    ),
    "pp4_frozen": Pipe("tp=1,cp=2,pp=4,dp=1", options={"freeze": "encoder+projector"}),
    "pp2_tp2_sp": Pipe("tp=2,pp=2,dp=2", "tp=2,dp=4", {"sequence_parallel": True}),
}


@pytest.fixture(scope="module", params=list(PIPES))
def pipe(request: pytest.FixtureRequest) -> Iterator[Model]:
    given = PIPES[request.param]
    options = replace(OPTIONS, **given.options)
    with model(given.vision, given.language, options) as made:
        yield made


def planned(trainer: Trainer, batch: Batch) -> dict[str, Any]:
    """One rank's inputs with its routes: ``local`` gives encoder replicas runs of all images."""
    bridge = trainer.plans.bridges[VISION]
    group = bridge.layout.group_of(dist.get_rank())
    mask = (batch.input_ids == int(Token.IMAGE)).cpu().numpy()
    parts = np.split(mask, bridge.layout.dest_dp_size)
    places = [TokenRuns.from_mask(parts[dp]) for dp in group.dest_dps]
    tokens = int(mask.sum()) // max(len(batch.images), 1)  # of an image
    items = split_items(len(batch.images), bridge.layout.src_dp_size)
    held = [(items[dp].stop - items[dp].start) * tokens for dp in group.src_dps]
    plan = plan_routes(bridge.layout, dist.get_rank(), places, held)
    return {**local(trainer, batch), "route_plan": {VISION: plan}}


def inputs(made: Model, images: tuple[list[int], ...]) -> list[dict[str, Any]]:
    return [planned(made.trainer, batch) for batch in microbatches(images)]


@contextlib.contextmanager
def in_bubbles(made: Model, count: int, **others: Any) -> Iterator[None]:
    given = made.trainer.options
    made.trainer.options = replace(given, encode_in_bubbles=count, **others)
    try:
        yield
    finally:
        made.trainer.options = given
        made.trainer.model.zero_grad_buffer()


def run(made: Model, images: tuple[list[int], ...], count: int) -> Result:
    with pytest.MonkeyPatch.context() as patch, in_bubbles(made, count):
        patch.setattr("tests.unit_tests.mimo.test_pipeline_step_8rank.local", planned)
        return made.step(images)


@pytest.mark.parametrize(
    "images", [MIXED, LATE_IMAGES, EARLY_IMAGES, TEXT_ONLY * 3], ids=["mixed", "late", "early", "text"]
)
def test_gradients_are_those_without(images, pipe):
    plain = run(pipe, images, 0)
    trained = any(gradient.abs().sum() > 0 for gradient in plain.gradients.values())
    assert trained or images is not MIXED
    for count in range(1, len(images) - pipe.trainer.groups.pp.size() + 1):
        found = run(pipe, images, count)
        assert (found.loss, found.tokens) == (plain.loss, plain.tokens)
        assert found.gradients.keys() == plain.gradients.keys()
        for name, gradient in plain.gradients.items():
            assert torch.equal(found.gradients[name], gradient), (count, name)
