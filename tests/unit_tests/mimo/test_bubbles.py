# SPDX-License-Identifier: Apache-2.0
"""Encoders in the bubbles of 1F1B: Megatron-Core's own schedule, ranks as threads, modelled time.

What a step takes depends on the order alone in which real code computes, sends and waits. The same
over real process groups, with DDP and the optimizer: ``test_bubbles_8rank``.
"""

from __future__ import annotations

import doctest
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron.core.models.mimo import MimoModel
from megatron.core.models.mimo.pipeline import step as step_module
from megatron.core.models.mimo.pipeline import windows
from megatron.core.models.mimo.pipeline.between_stages import EncodingP2P
from megatron.core.models.mimo.pipeline.step import forward_backward_pipelined
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from tests.unit_tests.mimo.model_stubs import StubGroup
from tests.unit_tests.mimo.modelled_pipeline import PipelinedWorld
from tests.unit_tests.mimo.test_announced_plans import plans
from tests.unit_tests.mimo.test_stage_side import DP_LAST, EVEN, Case, StubStage, gradient_of

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

    def plan(self, rank: int, number: int, model: MimoModel) -> Any:
        return plans(self, rank, number, model)


class Unplanned(Piped):
    """One rank has no plan of the last microbatch."""

    def plan(self, rank: int, number: int, model: MimoModel) -> Any:
        last = number == len(self.images) - 1
        return None if last and rank == 2 else super().plan(rank, number, model)


def piped(stages: int, **options: Any) -> Piped:
    return Piped((1, 4), (1, 1, stages, 4 // stages), images=IMAGES, **options)


def step(case: Case, rank: int, model: MimoModel, in_bubbles: int, pp: Any) -> dict[str, Any]:
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
            {**case.inputs(rank, number), "route_plan": case.plan(rank, number, model)}
            for number in range(count)
        ),
        model=model,
        num_microbatches=count,
        pg_collection=ProcessGroupCollection(pp=pp, **alone),
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
            return step(case, rank, model, in_bubbles, grids["language"].create_pg("pp"))

        found = world.run(on_rank)
    return max(world.now), found


@pytest.mark.parametrize("frozen", [False, True], ids=["trains", "frozen"])
@pytest.mark.parametrize("stages", [2, 4])
def test_gradients_are_those_without(stages, frozen):
    case = piped(stages, frozen=frozen)
    _, expected = played(case, 0)
    assert any(g is not None and g.norm() > 0.5 for g in expected[0].values())
    for count in (1, len(IMAGES) - stages):
        _, found = played(case, count)
        for mine, plain in zip(found, expected, strict=True):
            assert mine.keys() == plain.keys()
            for name, gradient in plain.items():
                assert (mine[name] is None) == (gradient is None), (count, name)
                assert gradient is None or torch.equal(mine[name], gradient), (count, name)


# (stages, microbatches in bubbles): encoding them takes the p - 1 forward passes of a stage.
FITS = [(2, 1), (4, 3)]


@pytest.mark.parametrize("frozen", [False, True], ids=["trains", "frozen"])
@pytest.mark.parametrize(("stages", "count"), FITS)
def test_what_fits_in_the_bubbles_takes_no_time(stages, count, frozen):
    """A third of each stage's bubble, which is all that it waits for to begin."""
    forward, backward = STAGE
    bubble = (stages - 1) * (forward + backward)
    pipeline = len(IMAGES) * (forward + backward) + bubble
    encoding = sum(ENCODER[: 1 if frozen else 2]) * len(IMAGES)
    plain, _ = played(piped(stages, frozen=frozen), 0)
    assert plain == encoding + pipeline + WIRE * (1 if frozen else 2)
    found, _ = played(piped(stages, frozen=frozen), count)
    assert found == plain - count * ENCODER[0]
    assert count * ENCODER[0] / bubble == pytest.approx(1 / 3)
    if stages == 4 and frozen:
        assert found / plain < 0.93


@pytest.mark.parametrize("share", [0, 1])
def test_all_of_it_before_one_wait_is_late(share, monkeypatch):
    """The control: the first stage has no first input to wait for, the last one no gradient."""
    fits, _ = played(piped(4, frozen=True), 3)
    monkeypatch.setattr(step_module, "before_the_first_input", lambda later, *_: share * later)
    plain, late = (played(piped(4, frozen=True), count)[0] for count in (0, 3))
    assert fits < late == plain


def test_what_does_not_fit_costs_time():
    """An encoder that takes long beside a stage: the first stage waits for the last one to encode,
    and then the last one for the first. So it is off by default."""
    heavy, light = (40.0, 80.0), (10.0, 20.0)
    plain, few, many = (played(piped(2, frozen=True), n, heavy, light)[0] for n in (0, 2, 6))
    assert plain < few < many
    assert many / plain > 1.3


def test_a_rank_that_waits_for_the_rows_at_once_waits_forever(monkeypatch):
    """The control of there being no deadlock: stock's first sends wait for who waits for rows."""
    receive = EncodingP2P.recv_forward

    def impatient(p2p: EncodingP2P, *args: Any, **kwargs: Any) -> Any:
        if p2p.pp_group.rank():
            p2p._encoders._in_bubbles.land()
        return receive(p2p, *args, **kwargs)

    monkeypatch.setattr(EncodingP2P, "recv_forward", impatient)
    with pytest.raises(AssertionError, match="ranks would wait forever: .*all_to_all"):
        played(piped(4, frozen=True), 3)


def test_an_encoder_that_fails_in_a_bubble_is_one_error_on_all_ranks():
    """After the pipeline, which ran on with zeros; the next step is as if there had been none."""
    case = piped(4)

    def on_rank(rank: int) -> tuple[str, dict[str, Any]]:
        model, grids = case.build(rank)
        pp, passes = grids["language"].create_pg("pp"), itertools.count()

        def fail(*_: Any) -> None:
            if next(passes) == 6 and rank == 1:
                raise OSError("no such pixel")

        model.modality_submodules["images"].register_forward_pre_hook(fail)
        with pytest.raises(ValueError) as told:
            step(case, rank, model, 3, pp)
        model.zero_grad()
        return str(told.value), step(case, rank, model, 3, pp)

    with pytest.MonkeyPatch.context() as patch:
        found = PipelinedWorld(case.size, WIRE, patch).run(on_rank)
    (said,) = {text for text, _ in found}
    assert said.endswith("is not used. rank 1: an encoder raised OSError: no such pixel")
    _, expected = played(case, 3)
    for (_, mine), plain in zip(found, expected, strict=True):
        assert all(torch.equal(mine[name], plain[name]) for name in plain)


def test_a_later_microbatch_without_a_plan_is_refused_on_all_ranks():
    """Before an encoder runs."""

    def on_rank(rank: int) -> str:
        case = Unplanned((1, 4), (1, 1, 2, 2), images=IMAGES)
        model, grids = case.build(rank)
        ran = []
        model.modality_submodules["images"].register_forward_pre_hook(lambda *_: ran.append(1))
        with pytest.raises(ValueError) as told:
            step(case, rank, model, 1, grids["language"].create_pg("pp"))
        assert not ran
        return str(told.value)

    with pytest.MonkeyPatch.context() as patch:
        (said,) = set(PipelinedWorld(4, WIRE, patch).run(on_rank))
    assert said.startswith("Nothing was encoded. rank 2: a microbatch that is encoded in a bubble")


def test_a_way_whose_ranks_meet_when_they_encode_leaves_nothing_for_later():
    def refused(case: Case, rank: int, model: MimoModel) -> None:
        with pytest.raises(ValueError, match="over a bridge whose ranks meet when they encode"):
            model.encode_microbatches([case.inputs(rank, n) for n in range(3)], later=1)

    Case((1, 4), (1, 2, 2, 1), **DP_LAST, **EVEN).run(refused)


def test_the_share_before_the_first_input():
    outcome = doctest.testmod(windows)
    assert outcome.attempted
    assert not outcome.failed
