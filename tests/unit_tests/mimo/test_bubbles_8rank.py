# SPDX-License-Identifier: Apache-2.0
"""Encoders in the bubbles of 1F1B on 8 ranks: the same gradients, to the last bit.

The oracle is the same model that encodes all microbatches first, which ``test_pipeline_step_8rank``
compares with one process. What the bubbles hold is in ``test_bubbles``.
"""

from __future__ import annotations

import contextlib
import itertools
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
from megatron.core.models.mimo.memory.policy import EncoderMemory
from megatron.core.models.mimo.model.routed_path import RoutedPath
from megatron.core.utils import unwrap_model
from tests.models.model import VISION
from tests.models.trainer import Trainer
from tests.unit_tests.mimo.test_pipeline_step_8rank import (
    MIXED,
    OPTIONS,
    Model,
    Result,
    local,
    microbatches,
    model,
    reading,
)

pytestmark = pytest.mark.ranks(8, timeout=120)

# Some windows of these are empty: the first part of the step, or all that is left for bubbles.
LATE = ([0, 0, 0, 0],) * 4 + ([0, 1, 1, 0], [1, 0, 0, 1])


@dataclass(frozen=True)
class Pipe:
    """A model with stages."""

    language: str
    vision: str = "tp=1,dp=8"
    options: dict[str, Any] = field(default_factory=dict)


PIPES = {
    "pp2_sp_trains": Pipe("tp=2,pp=2,dp=2", "tp=2,dp=4", {"sequence_parallel": True}),
    "pp2_offloaded_levels": Pipe(
        "tp=2,pp=2,dp=2",
        "tp=2,dp=4",
        {"memory": EncoderMemory("offload", "recompute", offload_from=0), "deepstack": (0, 1)},
    ),
    "pp4_projector_trains": Pipe(
        "tp=1,cp=2,pp=4,dp=1", options={"freeze": "encoder", "overlap_grad_reduce": False}
    ),
    "pp4_frozen": Pipe("tp=1,cp=2,pp=4,dp=1", "tp=2,dp=4", {"freeze": "encoder+projector"}),
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
    """One step; so many of its microbatches were encoded later than the others."""
    later = []
    encode = RoutedPath.encode_compared

    def noted(path: RoutedPath, compared: Any) -> Any:
        later.append(compared)
        return encode(path, compared)

    with pytest.MonkeyPatch.context() as patch, in_bubbles(made, count):
        patch.setattr("tests.unit_tests.mimo.test_pipeline_step_8rank.local", planned)
        patch.setattr(RoutedPath, "encode_compared", noted)
        found = made.step(images)
        assert len(later) == count
        evaluated = made.step(images, forward_only=True)
        assert (evaluated.loss, evaluated.tokens) == (found.loss, found.tokens)
        assert len(later) == count
        return found


@pytest.mark.parametrize("images", [MIXED, LATE, LATE[::-1]], ids=["mixed", "late", "early"])
def test_gradients_are_those_without(images, pipe):
    plain = run(pipe, images, 0)
    assert any(gradient.abs().sum() > 0 for gradient in plain.gradients.values())
    for count in {1, len(images) - pipe.trainer.groups.pp.size()}:
        found = run(pipe, images, count)
        assert (found.loss, found.tokens) == (plain.loss, plain.tokens)
        assert found.gradients.keys() == plain.gradients.keys()
        for name, gradient in plain.gradients.items():
            assert torch.equal(found.gradients[name], gradient), (count, name)


@pytest.mark.parametrize("after", [0, 5], ids=["first_ones", "later_ones"])
def test_a_loader_that_fails_on_one_rank_stops_all(after, pipe):
    """All microbatches are read before one is encoded, so nobody is in the pipeline then."""
    batches = inputs(pipe, MIXED)
    data = reading(batches[:after], OSError("disk gone")) if dist.get_rank() == 5 else iter(batches)
    message = "rank 5: reading data_iterator raised OSError: disk gone"
    with in_bubbles(pipe, 1), pytest.raises(ValueError, match=f"^Nothing was encoded. {message}"):
        pipe.trainer.schedule(data, len(MIXED))


def test_an_encoder_that_fails_in_a_bubble_stops_all(pipe):
    """With one sentence, after the pipeline. Gradients are under way then, so nothing goes on."""
    encoder = unwrap_model(pipe.built.model.modality_submodules[VISION])
    tp = pipe.built.collections[VISION].tp.size()
    passes, images = itertools.count(), ([1, 1, 1, 1],) * 6

    def fail(*_: Any) -> None:
        if next(passes) == 5 and dist.get_rank() // tp == 1:
            raise KeyError("pixel")

    hook = encoder.register_forward_pre_hook(fail)
    message = r"is not used\. ranks? [1-3-]+: an encoder raised KeyError: 'pixel'$"
    try:
        with in_bubbles(pipe, 1), pytest.raises(ValueError, match=message):
            pipe.trainer.schedule(iter(inputs(pipe, images)), 6)
    finally:
        hook.remove()


@pytest.mark.parametrize(
    ("vision", "language", "options", "given", "message"),
    [
        ("tp=8,dp=1", "tp=1,cp=2,pp=2,dp=2", {}, 1, "has ranks on several pipeline stages"),
        ("tp=1,dp=8", "tp=1,cp=2,pp=2,dp=2", {"bridge": "gather"}, 1, "needs a routed bridge"),
        ("tp=1,dp=8", "tp=1,cp=2,dp=4", {}, 1, "this language model has no pipeline stages"),
        ("tp=1,dp=8", "tp=1,cp=2,pp=2,dp=2", {"virtual_stages": 2}, 1, "has virtual stages"),
        ("tp=1,dp=8", "tp=1,cp=2,pp=2,dp=2", {}, 3, "so it can be 0 to 2"),
    ],
    ids=["replica", "gather", "one_stage", "virtual", "too_many"],
)
def test_where_it_does_not_work_it_is_refused(vision, language, options, given, message):
    """By name, before anything is read."""
    refused = pytest.raises(ValueError, match=f"^encode_in_bubbles={given}.* {message}")
    options = replace(OPTIONS, **options)
    with model(vision, language, options) as made, in_bubbles(made, given), refused:
        made.trainer.schedule(iter(()), 4)
