# SPDX-License-Identifier: Apache-2.0
"""Encoders in the bubbles of 1F1B: Megatron-Core's own schedule, ranks as threads, modelled time.

What a step takes depends on the order alone in which real code computes, sends and waits. The same
over real process groups, with DDP and the optimizer: ``test_bubbles_8rank``.
"""

from __future__ import annotations

import doctest
import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron.core.models.mimo import MimoModel
from megatron.core.models.mimo.pipeline import windows
from megatron.core.models.mimo.pipeline.between_stages import EncodingP2P
from megatron.core.models.mimo.pipeline.step import forward_backward_pipelined
from megatron.core.transformer.spec_utils import ModuleSpec
from tests.unit_tests.mimo.model_stubs import StubGroup
from tests.unit_tests.mimo.modelled_pipeline import PipelinedWorld
from tests.unit_tests.mimo.test_announced_plans import plans
from tests.unit_tests.mimo.test_stage_side import Case, StubStage, gradient_of

# Every one of four encoder replicas has an image in every microbatch.
IMAGES = ([1, 1, 1, 1], [2, 0, 1, 1], [0, 4, 0, 0], [2, 0, 0, 2]) * 2
# What encoding a microbatch takes, forward and backward; what a language stage does; an exchange.
ENCODER, STAGE, WIRE = (20.0, 40.0), (20.0, 40.0), 5.0


class Stage(StubStage):
    """Takes its input as stock's schedules give it."""

    def set_input_tensor(self, tensor: Any) -> None:
        super().set_input_tensor(tensor[0] if isinstance(tensor, list) else tensor)


class Piped(Case):
    """Four encoder replicas beside a language model in 4 stages, or in 2 of two replicas."""

    def stages(self, stage: int, params: dict[str, Any]) -> dict[str, Any]:
        return {"language_model_spec": ModuleSpec(module=Stage, params=params)}


def piped(stages: int, **options: Any) -> Piped:
    return Piped((1, 4), (1, 1, stages, 4 // stages), images=IMAGES, **options)


def step(case: Case, rank: int, model: MimoModel, in_bubbles: int, grids: Any) -> dict[str, Any]:
    """One step; the gradients of all weights of the rank."""
    numbers = itertools.count()

    def forward_step(data: Iterator[Any], stage: Any) -> Any:
        output, mask = stage(**next(data))

        def loss_func(output: torch.Tensor) -> Any:
            loss = (output * case.part(rank, gradient_of(next(numbers)))).sum()
            return loss, mask.sum().int(), loss.detach()

        return output, loss_func

    model.config.calculate_per_token_loss = True
    alone = {name: StubGroup() for name in ("tp", "cp", "dp_cp", "embd", "pos_embd")}
    count = len(case.images)
    forward_backward_pipelined(
        forward_step_func=forward_step,
        data_iterator=(
            {**case.inputs(rank, number), "route_plan": plans(case, rank, number, model)}
            for number in range(count)
        ),
        model=model,
        num_microbatches=count,
        pg_collection=SimpleNamespace(pp=grids["language"].create_pg("pp"), **alone),
        encode_in_bubbles=in_bubbles,
    )
    return {name: p.grad for name, p in model.named_parameters()}


def played(
    case: Case,
    in_bubbles: int,
    encoder: tuple[float, float] = ENCODER,
    stage: tuple[float, float] = STAGE,
) -> tuple[float, list[dict[str, Any]]]:
    """(what the step takes, gradients of every rank)."""
    with pytest.MonkeyPatch.context() as patch:
        world = PipelinedWorld(case.size, WIRE, patch)

        def on_rank(rank: int) -> dict[str, Any]:
            model, grids = case.build(rank)
            world.takes(model.modality_submodules["images"], *encoder)
            world.takes(model.language_model, *stage)
            return step(case, rank, model, in_bubbles, grids)

        found = world.run(on_rank)
    return max(world.now), found


@pytest.mark.parametrize("frozen", [False, True], ids=["trains", "frozen"])
@pytest.mark.parametrize("stages", [2, 4])
def test_gradients_are_those_without(stages, frozen):
    case = piped(stages, frozen=frozen)
    _, expected = played(case, 0)
    assert any(g is not None and g.norm() > 0.5 for g in expected[0].values())
    for count in range(1, len(IMAGES) - stages + 1):
        _, found = played(case, count)
        for mine, plain in zip(found, expected, strict=True):
            assert mine.keys() == plain.keys()
            for name, gradient in plain.items():
                assert (mine[name] is None) == (gradient is None), (count, name)
                assert gradient is None or torch.equal(mine[name], gradient), (count, name)
