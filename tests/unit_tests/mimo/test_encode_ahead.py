# SPDX-License-Identifier: Apache-2.0
"""Encoders ahead of a language model without stages, all ranks as threads of one process.

The oracle is ``MimoModel.forward``, microbatch by microbatch: gradients must be the same to the
last bit. That the world compares the calls of a group's members, and says who waits in vain, is
what shows that all ranks start the collectives in one order. What is under way while the language
model computes is read off the order of events. DDP and the optimizer: ``test_pipeline_step_8rank``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron.core.models.mimo import MimoModel
from megatron.core.models.mimo.comm.exchange import Exchange
from megatron.core.models.mimo.pipeline.step import forward_backward_pipelined
from tests.unit_tests.mimo import in_process_ranks
from tests.unit_tests.mimo.model_stubs import StubGroup
from tests.unit_tests.mimo.modelled_time import TimedWorld
from tests.unit_tests.mimo.test_stage_side import (
    BY_EIGHT,
    DP_LAST,
    EVEN,
    MIXED,
    Case,
    gradient_of,
)

# Each of four encoder replicas has some in every microbatch.
IMAGES = ([2, 0, 1, 3], [1, 1, 2, 0], [2, 2, 2, 2], [0, 1, 0, 3], [1, 1, 1, 1])
TEXT_ONLY = ([0, 0, 0, 0],) * 3
CASES = {
    "fan_in_cp": Case((1, 4), (1, 2, 1, 2), **EVEN),
    "fan_in_cp4": Case((1, 4), (1, 4, 1, 1)),
    "sp": Case((2, 2), (2, 2, 1, 1), sequence_parallel=True),
    "fan_out": Case((4, 1), (1, 1, 1, 4)),
    "frozen": Case((1, 4), (1, 2, 1, 2), frozen=True, **EVEN),
    "text_only": Case((1, 4), (1, 2, 1, 2), images=TEXT_ONLY),
    "two_encoders": Case((1, 8), (1, 4, 1, 2), hears=(2, 4), **BY_EIGHT),
    "no_guard": Case((1, 4), (1, 4, 1, 1), options={"bridge_guard": "off"}),
    "gather_fan_in": Case((1, 4), (1, 2, 1, 2), **DP_LAST, **EVEN),
    "gather_fan_out": Case((4, 1), (1, 2, 1, 2), **DP_LAST, **EVEN),
    "mixed": Case((1, 8), (1, 4, 1, 2), hears=(2, 4), **MIXED, **BY_EIGHT),
}
Step = Callable[[Case, int, MimoModel], Any]


def loss_of(case: Case, rank: int, output: torch.Tensor, number: int) -> torch.Tensor:
    """Nothing at two places alike."""
    return (output * case.part(rank, gradient_of(number))).sum()


def gradients(model: MimoModel) -> dict[str, torch.Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters()}


def one_by_one(case: Case, rank: int, model: MimoModel) -> dict[str, torch.Tensor | None]:
    """Each microbatch through ``forward`` and backward, then the next one."""
    for number in range(len(case.images)):
        output, _ = model(**case.inputs(rank, number))
        loss_of(case, rank, output, number).backward()
    return gradients(model)


def ahead(count: int | None, *, forward_only: bool = False) -> Step:
    """A step over stock's schedule, with so many microbatches encoded ahead."""

    def run(case: Case, rank: int, model: MimoModel) -> dict[str, torch.Tensor | None]:
        numbers = itertools.count()

        def forward_step(data: Iterator[Any], stage: Any) -> Any:
            output, mask = stage(**next(data))

            def loss_func(output: torch.Tensor) -> Any:
                loss = loss_of(case, rank, output, next(numbers))
                return loss, mask.sum().int(), loss.detach()

            return output, loss_func

        model.config.calculate_per_token_loss = True
        names = ("pp", "tp", "cp", "dp_cp", "embd", "pos_embd")
        losses = forward_backward_pipelined(
            forward_step_func=forward_step,
            data_iterator=(case.inputs(rank, number) for number in range(len(case.images))),
            model=model,
            num_microbatches=len(case.images),
            pg_collection=SimpleNamespace(**{name: StubGroup() for name in names}),
            encode_ahead=count,
            forward_only=forward_only,
        )
        assert len(losses) == len(case.images)
        return gradients(model)

    return run


@pytest.mark.parametrize("name", list(CASES))
def test_gradients_are_those_of_one_microbatch_after_the_other(name: str) -> None:
    case = CASES[name]
    expected = case.run(one_by_one)
    if not case.frozen and name != "text_only":
        assert any(g is not None and g.norm() > 0.5 for g in expected[0].values())
    for count in (1, 2, 4, 9):
        for rank, found in enumerate(case.run(ahead(count))):
            assert found.keys() == expected[rank].keys()
            for key, gradient in expected[rank].items():
                if gradient is None:
                    assert found[key] is None or not found[key].any(), (count, rank, key)
                else:
                    assert torch.equal(found[key], gradient), (count, rank, key)


@pytest.mark.parametrize("name", ["fan_in_cp", "gather_fan_in", "mixed"])
def test_evaluation_leaves_no_gradients(name: str) -> None:
    for found in CASES[name].run(ahead(2, forward_only=True)):
        assert not any(gradient is not None for gradient in found.values())


class Events:
    """What every rank does, in order: (what, number of the microbatch).

    An exchange "there" brings rows, "back" their gradients; it begins and is waited for.
    """

    def __init__(self, size: int, patch: pytest.MonkeyPatch) -> None:
        self.of_rank: list[list[tuple[str, int]]] = [[] for _ in range(size)]
        self._exchanges: list[dict[Exchange, int]] = [{} for _ in range(size)]
        self._computed = [itertools.count() for _ in range(size)]
        self._returned: set[Exchange] = set()
        start, wait = Exchange.start, Exchange.wait

        def noted_start(exchange: Exchange, *arguments: Any) -> None:
            known = self._exchanges[self._rank]
            if exchange in known:
                self._returned.add(exchange)
            known.setdefault(exchange, len(known))
            self._note("begin", exchange)
            start(exchange, *arguments)

        def noted_wait(exchange: Exchange) -> None:
            if exchange._under_way is not None:
                self._note("wait", exchange)
            wait(exchange)

        patch.setattr(Exchange, "start", noted_start)
        patch.setattr(Exchange, "wait", noted_wait)

    @property
    def _rank(self) -> int:
        return in_process_ranks._here.rank

    def _note(self, what: str, exchange: Exchange) -> None:
        way = "back" if exchange in self._returned else "there"
        self.of_rank[self._rank].append((f"{what} {way}", self._exchanges[self._rank][exchange]))

    def watch(self, model: MimoModel) -> None:
        """Note where the language model of this rank begins, forward and backward."""

        def forward(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
            number, events = next(self._computed[self._rank]), self.of_rank[self._rank]
            events.append(("language forward", number))
            given = kwargs["decoder_input"]
            if given.requires_grad:
                given.register_hook(lambda _: events.append(("language backward", number)))

        model.language_model.register_forward_pre_hook(forward, with_kwargs=True)

    def check_under_way(self, count: int, microbatches: int, back: bool = True) -> None:
        """Exchanges run while the language model works on the microbatch before, or after."""
        for events in self.of_rank:
            place = {event: index for index, event in enumerate(events)}
            for n in range(microbatches):
                before = max(n - count, 0)
                assert place["begin there", n] < place["language forward", before]
                if n:
                    assert place["wait there", n] > place["language backward", n - 1]
                if back and n + 1 < microbatches:
                    assert place["begin back", n] < place["language forward", n + 1]
                    assert place["wait back", n] > place["language backward", n + 1]
            assert back == any(what.endswith("back") for what, _ in events)


def events_of(case: Case, step: Step, patch: pytest.MonkeyPatch) -> Events:
    seen = Events(case.size, patch)

    def body(case: Case, rank: int, model: MimoModel) -> None:
        seen.watch(model)
        step(case, rank, model)

    case.run(body)
    return seen


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("frozen", [False, True])
def test_exchanges_are_under_way_while_the_language_model_computes(
    count: int, frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = replace(CASES["fan_in_cp4"], images=IMAGES, frozen=frozen)
    seen = events_of(case, ahead(count), monkeypatch)
    seen.check_under_way(count, len(IMAGES), back=not frozen)


@pytest.mark.parametrize("step", [one_by_one, ahead(None)], ids=["one_by_one", "all_together"])
def test_without_it_nothing_is_under_way(step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control."""
    case = replace(CASES["fan_in_cp4"], images=IMAGES)
    seen = events_of(case, step, monkeypatch)
    with pytest.raises((AssertionError, KeyError)):
        seen.check_under_way(1, len(IMAGES))


# What an encoder and a language model take for a microbatch, forward and backward, and an exchange.
ENCODER, LANGUAGE, WIRE = (10.0, 20.0), (40.0, 80.0), 25.0


def modelled(step: Step, frozen: bool) -> tuple[float, float]:
    """(what a step of 15 microbatches takes, what of it a rank waits for exchanges)."""
    case = replace(CASES["fan_in_cp4"], images=3 * IMAGES, frozen=frozen)
    with pytest.MonkeyPatch.context() as patch:
        world = TimedWorld(case.size, WIRE, patch)

        def on_rank(rank: int) -> None:
            model, _ = case.build(rank)
            world.takes(model.modality_submodules["images"], *ENCODER)
            world.takes(model.language_model, *LANGUAGE)
            step(case, rank, model)

        world.run(on_rank)
    return max(world.now), max(world.waited)


@pytest.mark.parametrize("frozen", [False, True], ids=["trains", "frozen"])
@pytest.mark.parametrize("count", [1, 2])
def test_exchanges_cost_nothing_but_the_first_and_the_last(count: int, frozen: bool) -> None:
    """In modelled time: the first has more encoding beside it, the last an encoder's backward.

    The bound where exchanges are a fifth of the step or more: 0.8 of its time.
    """
    plain, waiting = modelled(one_by_one, frozen)
    ways, computing = (1, 130.0) if frozen else (2, 150.0)
    assert plain == 15 * (computing + ways * WIRE)
    assert waiting == 15 * ways * WIRE
    ahead_of_it, left = modelled(ahead(count), frozen)
    assert ahead_of_it == 15 * computing + left
    assert left == WIRE - count * ENCODER[0] + (0 if frozen else WIRE - ENCODER[1])
    if not frozen:
        assert waiting / plain >= 0.2
        assert ahead_of_it / plain <= 0.8


def test_microbatches_of_other_lengths_need_no_option() -> None:
    """No stage has to know the shape that it receives."""

    class Shorter(Case):
        def inputs(self, rank: int, microbatch: int) -> dict[str, Any]:
            batch = super().inputs(rank, microbatch)
            if microbatch == 1:
                for name in ("input_ids", "position_ids", "labels", "loss_mask"):
                    batch[name] = batch[name][:, :8]
            return batch

        def part(self, rank: int, whole: torch.Tensor) -> torch.Tensor:
            return super().part(rank, whole).sum()

    case = Shorter((1, 4), (1, 4, 1, 1), images=([2, 0, 1, 3],) * 3)
    for found, expected in zip(case.run(ahead(1)), case.run(one_by_one), strict=True):
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_loader_that_ends_early_stops_all_ranks() -> None:
    """In the midst of a step, with exchanges under way."""

    def early(case: Case, rank: int, model: MimoModel) -> str:
        short = replace(case, images=case.images[:3]) if rank == 2 else case
        with pytest.raises(ValueError, match="rank 2: data_iterator ended before") as told:
            ended(short, rank, model)
        return str(told.value)

    def ended(short: Case, rank: int, model: MimoModel) -> None:
        forward_backward_pipelined(
            forward_step_func=lambda data, stage: (
                stage(**next(data))[0], lambda output: (output.sum(), torch.ones(()).int(), {})
            ),
            data_iterator=(short.inputs(rank, number) for number in range(len(short.images))),
            model=model,
            num_microbatches=len(IMAGES),
            pg_collection=SimpleNamespace(
                **{name: StubGroup() for name in ("pp", "tp", "cp", "dp_cp", "embd", "pos_embd")}
            ),
            encode_ahead=1,
        )

    assert len(set(replace(CASES["fan_in_cp4"], images=IMAGES).run(early))) == 1
