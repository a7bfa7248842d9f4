# SPDX-License-Identifier: Apache-2.0
"""Plans that are compared while the encoders run, and what turns out otherwise afterwards.

All ranks are threads of one process: a rank that does not enter what others wait in, or enters
with other splits, fails here at once. The same over real process groups is in
``test_routed_bridge_8rank``.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.core.models.mimo import MimoModel
from megatron.core.models.mimo.comm.plan.routes import RoutePlan, plan_routes
from megatron.core.models.mimo.comm.plan.token_runs import TokenRuns
from megatron.core.models.mimo.comm.routed_bridge import RoutedBridge
from megatron.core.models.mimo.model.routed_path import RoutedPath
from tests.unit_tests.mimo.in_process_ranks import InProcessWorld
from tests.unit_tests.mimo.model_stubs import IMAGE, SOUND
from tests.unit_tests.mimo.routed_cases import EQUAL, FAN_IN, FAN_OUT, HIDDEN, Picture, bridge
from tests.unit_tests.mimo.test_routed_bridge import (
    FULL,
    changed_rows,
    errors,
    foreign_plan,
    other_assignment,
    other_plan,
)
from tests.unit_tests.mimo.test_stage_side import Case

pytestmark = pytest.mark.once

LAYOUTS = [
    pytest.param(*FAN_IN, id="fan_in"),
    pytest.param(*FAN_OUT, id="fan_out"),
    pytest.param(*EQUAL, id="equal"),
    pytest.param((4, 2), (4, 1, 2), id="nothing_to_move"),
]
LATE = [
    (
        changed_rows(lambda x: x.requires_grad_()),
        r"the rows need a gradient must be .* False on ranks .*; True on rank 2\. Freeze",
    ),
    (
        changed_rows(lambda x: x.float()),
        r"not used\. rank 2: its rows are 3 wide and torch.float32, .* 3 and torch.float64$",
    ),
    (
        changed_rows(lambda x: x[:, :2]),
        r"not used\. rank 2: its rows are 2 wide and torch.float64, .* 3 and torch.float64$",
    ),
    (changed_rows(lambda x: x[1:]), r"rank 2 brings \d+, the plan expects \d+\. Give"),
    (lambda *_: {"problem": "an encoder raised"}, r"is not used\. rank 2: an encoder raised$"),
]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_plan, r"token positions .*, got \w{16} on ranks 0-1, 3; \w{16} on rank 2\. Plan"),
        (other_assignment, r"rows per encoder replica .* on ranks 0-1, 3; \w{16} on rank 2\. As"),
        (foreign_plan, r"nothing was moved\. rank 2: the plan is for rank 3; plan each rank's"),
        (
            lambda *_: {"like": torch.empty(0, 2, dtype=torch.float64)},
            r"width must be .* got 3 on ranks 0-1, 3; 2 on rank 2\. Project",
        ),
        (
            lambda *_: {"like": torch.empty(0, 3)},
            r"dtype must be .* torch.float64 on ranks 0-1, 3; torch.float32 on rank 2\. Cast",
        ),
        (lambda *_: {"problem": "no images today"}, r"moved\. rank 2: no images today$"),
    ],
)
def test_what_was_announced_otherwise_is_one_error_before_rows_move(change, message):
    world = InProcessWorld(8)

    def body(rank: int) -> str:
        with bridge(*FAN_IN) as made:
            picture = Picture(made, FULL)
            rows = picture.rows[picture.mine]
            said = {"plan": picture.plan(made), "like": rows[:0]}
            said |= change(made, picture) if rank == 2 else {}
            made.announce(**said)
            with pytest.raises(ValueError) if rank < 4 else contextlib.nullcontext() as error:
                made.confirm(said["plan"], rows)
            assert not any(name == "all_to_all" for name, _ in world.counts(rank))
            return str(error and error.value)

    found = world.run(body)
    assert found[4:] == ["None"] * 4  # the other group is not concerned
    assert len(set(found[:4])) == 1
    assert re.search(message, found[0]), found[0]


@pytest.mark.parametrize(("src", "dest"), LAYOUTS)
@pytest.mark.parametrize(("change", "message"), LATE)
def test_what_turns_out_otherwise_is_one_error_after_the_exchange(change, message, src, dest):
    """Nobody is left in the exchange: the odd rank takes part in it with zeros."""

    def body(rank: int) -> None:
        with bridge(src, dest) as made:
            picture = Picture(made, FULL * (dest[2] // 2))
            plan, rows = picture.plan(made), picture.rows[picture.mine]
            group = made.exchange.ranks
            stated = {"plan": plan, "rows": rows}
            stated |= change(made, picture) if rank == 2 else {}
            made.announce(plan, rows[:0])
            own = made.move(made.confirm(**stated), plan)
            assert own.shape == (plan.own, HIDDEN)
            assert own.dtype == torch.float64
            made.settle()
            assert 2 not in group
            raise ValueError("fine")

    found = errors(8, body)
    concerned = [text for text in found if text != "fine"]
    assert len(set(concerned)) == 1
    assert concerned[0].startswith("Bridge images -> language, exchange group of ranks ")
    assert re.search(message, concerned[0]), concerned[0]


def test_a_rank_that_takes_no_part_leaves_the_others_waiting():
    """The control of the test above: the odd rank raises alone, as without a guard."""

    def body(rank: int) -> None:
        with bridge(*FAN_IN) as made:
            picture = Picture(made, FULL)
            plan, rows = picture.plan(made), picture.rows[picture.mine]
            made.announce(plan, rows[:0])
            moving = made.confirm(plan, rows, "an encoder raised" if rank == 2 else None)
            if rank != 2:
                made.move(moving, plan)
                made.settle()

    with pytest.raises(AssertionError, match="ranks would wait forever: rank 0 in all_to_all"):
        InProcessWorld(8).run(body)


@pytest.mark.parametrize(("src", "dest"), LAYOUTS)
def test_number_and_time_of_messages(src, dest):
    """One when announced, none when confirmed, one when settled: neither around the exchange."""
    world = InProcessWorld(8)

    def gathers(rank: int) -> int:
        return sum(n for (name, _), n in world.counts(rank).items() if name == "all_gather")

    @world.run
    def _(rank: int) -> None:
        with bridge(src, dest) as made:
            picture = Picture(made, FULL * (dest[2] // 2))
            plan, rows = picture.plan(made), picture.rows[picture.mine].requires_grad_()
            for number in range(2):
                made.announce(plan, rows[:0])
                assert gathers(rank) == 2 * number + 1
                moving = made.confirm(plan, rows)
                assert moving is rows
                made.move(moving, plan).sum().backward()
                assert gathers(rank) == 2 * number + 1
                made.start_settling()
                made.settle()
                assert gathers(rank) == 2 * number + 2


@pytest.mark.parametrize("guard", ["first", "off"])
def test_other_guards_announce_nothing(guard):
    world = InProcessWorld(8)

    @world.run
    def _(rank: int) -> None:
        with bridge(*FAN_IN, guard=guard) as made:
            picture = Picture(made, FULL)
            plan, rows = picture.plan(made), picture.rows[picture.mine]
            made.announce(plan, rows[:0])
            assert not world.counts(rank)
            assert made.confirm(plan, rows) is rows
            assert len(world.counts(rank)) == (guard == "first")
            made.settle()
            assert len(world.counts(rank)) == (guard == "first")


def test_a_plan_that_some_ranks_announce_only():
    def body(rank: int) -> None:
        with bridge(*FAN_IN) as made:
            picture = Picture(made, FULL)
            plan, rows = picture.plan(made), picture.rows[picture.mine]
            if rank not in (3, 7):
                made.announce(plan, rows[:0])
            made.confirm(plan, rows)

    found = errors(8, body)
    assert len(set(found[:4])) == 1
    assert "got yes, and announced on ranks 0-2; yes on rank 3. Give" in found[0]


def test_another_plan_than_the_announced_one_is_refused():
    def body(rank: int) -> None:
        with bridge(*FAN_IN) as made:
            picture = Picture(made, FULL)
            rows = picture.rows[picture.mine]
            made.announce(picture.plan(made), rows[:0])
            made.confirm(picture.plan(made), rows)

    assert all("another plan is confirmed than was announced" in text for text in errors(8, body))


@pytest.mark.parametrize("late", [False, True], ids=["announced", "late"])
def test_after_an_error_the_next_step_is_as_if_there_had_been_none(late):
    @InProcessWorld(8).run
    def _(rank: int) -> None:
        with bridge(*FAN_IN) as made:
            picture = Picture(made, FULL)
            plan, rows = picture.plan(made), picture.rows[picture.mine]
            problem = "no" if rank in (2, 6) else None
            made.announce(plan, rows[:0], None if late else problem)
            if late:
                made.move(made.confirm(plan, rows, problem), plan)
            with pytest.raises(ValueError, match="ranks? [26]: no"):
                made.settle() if late else made.confirm(plan, rows)
            made.forget_unsettled()
            made.announce(plan, rows[:0])
            made.confirm(plan, rows)
            picture.check(made, plan)
            made.settle()


def test_the_first_of_several_exchanges_that_went_wrong_is_raised():
    """As of the microbatches of a step in stages, whose rows move together."""

    @InProcessWorld(8).run
    def _(rank: int) -> None:
        with bridge(*FAN_IN) as made:
            picture = Picture(made, FULL)
            plan, rows = picture.plan(made), picture.rows[picture.mine]
            for number in range(3):
                made.announce(plan, rows[:0])
                made.confirm(plan, rows, f"no {number}" if rank in (2, 6) and number else None)
            with pytest.raises(ValueError, match="rank [26]: no 1$"):
                made.settle()
            made.settle()  # nothing is left


# -- in a model ------------------------------------------------------------------------------

IMAGES = ([2, 2, 2, 2], [1, 3, 4, 0])
SOUNDS = ([2, 0, 1, 1], [0, 2, 1, 1])
MODELS = {
    "fan_in": Case((1, 8), (2, 2, 1, 2)),
    "equal": Case((2, 4), (1, 2, 1, 4)),
    "fan_out": Case((4, 2), (2, 1, 1, 4)),
    "two_encoders": Case((1, 8), (1, 4, 1, 2), hears=(2, 4)),
    "groups_differ": Case((1, 8), (1, 2, 1, 4), hears=(8, 1)),
}


def plans(case: Case, rank: int, number: int, model: MimoModel) -> dict[str, RoutePlan]:
    """What a loader would plan for a microbatch."""
    found = {}
    for name, token, layout in (("images", IMAGE, case.src), ("sounds", SOUND, case.hears)):
        if layout is None:
            continue
        made: RoutedBridge = model.colocated_comms[name, "language"]
        group = made.layout.group_of(rank)
        batches = [case.inputs(r, number)["input_ids"] for r in range(case.size)]
        replica = {case.coordinate(r, "dp"): batch for r, batch in enumerate(batches)}
        places = [TokenRuns.from_mask((replica[dp] == token).numpy()) for dp in group.dest_dps]
        items = sum((case.images if name == "images" else case.sounds)[number])
        shares = [len(each) for each in torch.arange(items).tensor_split(layout[1])]
        held = [2 * shares[dp] for dp in group.src_dps]
        found[name] = plan_routes(made.layout, rank, places, held)
    return found


def runs(case: Case, failing: int | None, raised: BaseException) -> list[Any]:
    """Errors of a first forward pass, and what comes out of a second one, of every rank."""

    def body(case: Case, rank: int, model: MimoModel) -> tuple[Any, Any, Any]:
        # A language model whose ranks wait for one another, as layers with TP and CP do.
        everybody = model.colocated_comms["images", "language"].control
        model.language_model.register_forward_pre_hook(
            lambda *_: dist.all_reduce(torch.zeros(1), group=everybody)
        )
        encoder = model.modality_submodules["images"]
        fails = iter([rank == failing])
        encoder.register_forward_pre_hook(lambda *_: fail(next(fails, False), raised))
        passes: list[Any] = []
        for number in (0, 0):
            batch = case.inputs(rank, number)
            batch["modality_inputs"]["images"] = batch["modality_inputs"]["images"] or {
                "linear": {"x": torch.empty(0, 2, 4)}
            }
            given = {"route_plan": plans(case, rank, number, model)}
            try:
                passes.append(model(**batch, **given)[0].detach())
            except ValueError as error:
                passes.append((str(error), error.__cause__))
        fused = model.language_model.called_with["decoder_input"].detach()
        return passes[0], passes[1], fused

    return replace(case, images=IMAGES, sounds=SOUNDS).run(body)


def fail(due: bool, raised: BaseException) -> None:
    if due:
        raise raised


@pytest.mark.parametrize("name", MODELS)
def test_an_encoder_that_raises_is_one_error_on_all_ranks(name):
    """Encoder failed after its plan was announced; then the model goes on as if nothing was."""
    case, raised = MODELS[name], KeyError("pixels")
    groups = case.run(lambda _c, _r, m: m.colocated_comms["images", "language"].exchange.ranks)
    found, whole = runs(case, 2, raised), runs(case, None, raised)
    concerned = {rank for rank, group in enumerate(groups) if 2 in group}
    assert len(concerned) > 1
    said = {found[rank][0][0] for rank in concerned}
    (text,) = said
    assert "what was moved is not used. rank 2: an encoder raised KeyError: 'pixels'" in text
    for rank, (first, second, fused) in enumerate(found):
        if rank in concerned:
            assert first[1] is (raised if rank == 2 else None)
        elif name == "groups_differ":  # it shares the other modality's group with rank 2
            assert "rank 2: an encoder raised KeyError: 'pixels'" in first[0]
        else:
            assert torch.equal(first, whole[rank][0])
        assert torch.equal(second, whole[rank][1])
        assert torch.equal(fused, whole[rank][2])


def test_without_hearing_zeros_would_be_taken_for_rows(monkeypatch):
    """The control of the test above."""
    monkeypatch.setattr(RoutedPath, "settle", lambda self: None)
    found = runs(MODELS["fan_in"], 2, KeyError("pixels"))
    assert not any(isinstance(first, tuple) for first, *_ in found)
    assert any(not torch.equal(first, second) for first, second, _ in found)


def test_a_batch_that_cannot_be_used_is_said_before_encoders_have_run():
    """The language model does not run: what is known ahead is raised before rows move."""
    case = replace(MODELS["fan_in"], images=IMAGES)

    def body(case: Case, rank: int, model: MimoModel) -> tuple[str, bool]:
        batch = case.inputs(rank, 0)
        plan = plans(case, rank, 1 if rank == 2 else 0, model)
        text = ""
        try:
            model(**batch, route_plan=plan)
        except ValueError as error:
            text = str(error)
        return text, bool(model.language_model.called_with)

    found = case.run(body)
    group = [rank for rank, (text, _) in enumerate(found) if "rank 2" in text]
    assert len(group) == 4
    assert len({found[rank][0] for rank in group}) == 1
    assert "nothing was moved. rank 2: the route plan of images has" in found[2][0]
    assert [called for _, called in found] == [rank not in group for rank in range(8)]
