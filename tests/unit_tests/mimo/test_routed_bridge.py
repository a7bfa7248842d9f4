# SPDX-License-Identifier: Apache-2.0
"""The routed bridge with all ranks as threads of one process: every layout, every empty rank,
every error.

``InProcessWorld`` compares the calls of a group's members and names who would wait forever, so a
rank that does not enter, or enters with other splits, fails here at once. ``routed_cases`` has the
oracle; the same bridge on real process groups is in ``test_routed_bridge_8rank``.
"""

from __future__ import annotations

import gc
import itertools
import re
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron.core.hyper_comm_grid import GridShape, HyperCommGrid
from megatron.core.models.mimo.comm import routed_bridge
from megatron.core.models.mimo.comm.exchange import PlanTensors, issue_exchange
from megatron.core.models.mimo.comm.gather_bridge import common_backend
from megatron.core.models.mimo.comm.plan.routed_layout import RouteLayout
from megatron.core.models.mimo.comm.plan.routes import plan_routes
from megatron.core.models.mimo.comm.plan.token_runs import (
    TokenRuns,
    expand,
    rows_of_items,
    runs_of,
    split_items,
)
from megatron.core.models.mimo.comm.routed_bridge import RoutedBridge, takes_host_tensors
from tests.unit_tests.mimo.in_process_ranks import InProcessWorld
from tests.unit_tests.mimo.routed_cases import (
    EQUAL,
    FAN_IN,
    FAN_OUT,
    HIDDEN,
    POWERS,
    Picture,
    bridge,
    random_masks,
)

pytestmark = pytest.mark.once

FULL = [np.ones((2, 16), dtype=bool)] * 2


def on_ranks(size: int) -> Callable[[Callable[[int], Any]], list[Any]]:
    """Runs a function of the rank on so many ranks."""
    return InProcessWorld(size).run


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tp_copies", "sp"])
@pytest.mark.parametrize("src_tp", POWERS)
def test_every_pair_of_8_rank_layouts(src_tp, sequence_parallel):
    """Uneven tokens, samples and replicas without any; planned by the bridge and ahead."""
    for tp, cp in itertools.product(POWERS, POWERS):
        if 8 % (tp * cp):
            continue
        dest = (tp, cp, 8 // (tp * cp))

        @on_ranks(8)
        def _(rank: int, dest=dest, tp=tp, cp=cp) -> None:
            with bridge((src_tp, 8 // src_tp), dest, sequence_parallel=sequence_parallel) as made:
                picture = Picture(made, random_masks(dest[2], 2 * cp * tp))
                picture.check(made)
                plan = picture.plan(made)
                made.confirm(plan, picture.rows[picture.mine])
                picture.check(made, plan)


@pytest.mark.parametrize(
    ("src", "dest"),
    [
        pytest.param((2, 3), (1, 3, 2), id="3_to_2"),
        pytest.param((3, 2), (2, 1, 3), id="2_to_3"),
        pytest.param((3, 4), (1, 2, 6), id="4_to_6"),
        pytest.param((2, 6), (1, 3, 4), id="6_to_4"),
        pytest.param((1, 8), (2, 4, 1), id="8_to_1"),
    ],
)
def test_dp_sizes_that_do_not_divide(src, dest):
    """Batches of one sample: the images of a sample are split over several encoder replicas."""

    @on_ranks(src[0] * src[1])
    def _(rank: int) -> None:
        with bridge(src, dest) as made:
            generator = np.random.default_rng(4)
            seq_len = 24 * dest[1]
            masks = [generator.random((1, seq_len)) < 0.6 for _ in range(dest[2])]
            Picture(made, masks).check(made)


@pytest.mark.parametrize(
    ("src", "dest"),
    [((1, 8), (2, 2, 2)), ((2, 4), (1, 2, 4)), ((4, 2), (1, 1, 8)), ((2, 3), (1, 3, 2))],
    ids=["fan_in_of_4", "equal", "fan_out_of_4", "3_to_2"],
)
def test_every_combination_of_empty_and_non_empty_ranks(src, dest):
    """Forward and backward; a rank that waits for one without rows is named at once."""

    @on_ranks(src[0] * src[1])
    def _(rank: int) -> None:
        with bridge(src, dest) as made:
            group = made.layout.group_of(rank)
            encoders, languages = group.src_dps.size, group.dest_dps.size
            for has_rows in itertools.product([0, 1], repeat=encoders):
                for has_tokens in itertools.product([0, 1], repeat=languages):
                    if any(has_rows) != any(has_tokens):
                        continue
                    masks = [np.full((1, 12), bool(has_tokens[dp % languages]))
                             for dp in range(dest[2])]  # fmt: skip
                    total = 12 * sum(has_tokens)
                    cuts = np.cumsum(has_rows) * total // max(sum(has_rows), 1)
                    picture = Picture(made, masks, cuts=cuts[:-1].tolist())
                    assert [bool(n) for n in picture.held] == [bool(on) for on in has_rows]
                    picture.check(made)


def test_assigned_items_return_to_their_places():
    """Images in an order and on encoders that a balancer might choose, across all replicas."""
    runs = rows_of_items([2, 7, 3, 52], [[3, 0], [], [1], [2]])

    @on_ranks(8)
    def _(rank: int) -> None:
        with bridge(*FAN_IN, one_group=True) as made:
            picture = Picture(made, FULL)
            plan = plan_routes(made.layout, rank, picture.tokens, runs)
            rows = torch.from_numpy(expand(runs[made.layout.src_dp[rank]]))
            held = picture.rows[rows].requires_grad_()
            made.confirm(plan, held)
            own, place = made.move(held, plan), made.tensors(plan, held.device).place
            assert torch.equal(own, picture.local(picture.rows)[place])
            own.backward(picture.local(picture.gradient)[place])
            assert torch.equal(held.grad, picture.gradient[rows])


@pytest.mark.parametrize(
    ("src", "dest", "forward", "backward"),
    [
        pytest.param(*FAN_IN, 1, 1, id="fan_in"),
        pytest.param(*FAN_OUT, 0, 1, id="fan_out"),
        pytest.param(*EQUAL, 0, 1, id="equal"),
        pytest.param((4, 2), (4, 1, 2), 0, 0, id="nothing_to_move"),
    ],
)
def test_kind_and_number_of_collectives(src, dest, forward, backward):
    world = InProcessWorld(8)

    def counts(rank: int) -> dict[str, int]:
        found = {name: n for (name, ranks), n in world.counts(rank).items()}
        for key in [key for key in world.calls if key[0] == rank]:
            del world.calls[key]
        return found

    def moved(number: int) -> dict[str, int]:
        return {"all_to_all": 1} if number else {}

    @world.run
    def _(rank: int) -> None:
        with bridge(src, dest, guard="first") as made:
            picture = Picture(made, [np.ones((2, 16), dtype=bool)] * dest[2])
            plan, held = picture.plan(made), picture.rows[picture.mine]
            for expected in ({"all_gather": 1}, {}):
                made.confirm(plan, held)
                assert counts(rank) == expected
            y = made.move(held.clone().requires_grad_(), plan)
            assert counts(rank) == moved(forward)
            y.sum().backward()
            assert counts(rank) == moved(backward)
            # Frozen encoder and projector: nobody needs the gradient, so nobody sends it.
            y = made.move(held, plan) * torch.ones(1, requires_grad=True)
            assert counts(rank) == moved(forward)
            y.sum().backward()
            assert counts(rank) == {}
            # Positions that only the rank itself knows cost one message.
            made.plan(picture.own_tokens, held)
            assert counts(rank) == {"all_gather": 1}
            # A microbatch without any row: agreed on, and then nobody enters.
            nothing = held[:0].clone().requires_grad_()
            empty = TokenRuns.from_mask(np.zeros((2, 16), dtype=bool))
            plan = made.plan(empty, nothing)
            assert plan.group_rows == 0
            assert counts(rank) == {"all_gather": 1}
            made.move(nothing, plan).sum().backward()
            assert counts(rank) == {}
            assert nothing.grad.shape == (0, HIDDEN)


def test_rows_that_stay_are_not_copied():
    grid = GridShape((1, 1), ("tp", "dp"))
    layout = RouteLayout.from_grids(grid, grid)
    tokens = TokenRuns.from_positions(np.array([1, 2, 5]), batch=1, seq_len=8)
    rows = torch.randn(3, HIDDEN, requires_grad=True)
    for held, stays in (([3], True), ([np.array([[1, 2], [0, 1]])], False)):
        plan = plan_routes(layout, 0, [tokens], held)
        own = issue_exchange(rows, PlanTensors.of(plan, rows.device), None).arrive()
        assert (own.data_ptr() == rows.data_ptr()) == stays
        rows.grad = None
        own.backward(gradient := torch.randn(3, HIDDEN))
        order = [0, 1, 2] if stays else [2, 0, 1]
        assert torch.equal(own[plan.place.argsort()], rows[order])
        assert torch.equal(rows.grad[order], gradient[plan.place.argsort()])


def test_a_graph_that_is_walked_twice():
    @on_ranks(8)
    def _(rank: int) -> None:
        with bridge(*FAN_IN) as made:
            picture = Picture(made, random_masks(2, 16))
            held = picture.rows[picture.mine].clone().requires_grad_()
            plan = picture.plan(made)
            y = made.move(held, plan)
            weights = picture.local(picture.gradient)[made.tensors(plan, held.device).place]
            for factor in (1, 2):
                (found,) = torch.autograd.grad(
                    (factor * weights * y).sum(), held, retain_graph=True
                )
                assert torch.equal(found, factor * picture.gradient[picture.mine])


def errors(size: int, body: Callable[[int], Any]) -> list[str]:
    """The error of every rank."""

    def caught(rank: int) -> str:
        with pytest.raises(ValueError) as error:
            body(rank)
        return str(error.value)

    return on_ranks(size)(caught)


def other_plan(made: RoutedBridge, picture: Picture) -> dict[str, Any]:
    shifted = [TokenRuns.from_positions(np.arange(32) + 2, 2, 32)] * len(picture.tokens)
    return {"plan": plan_routes(made.layout, dist.get_rank(), shifted, [16, 16])}


def other_assignment(made: RoutedBridge, picture: Picture) -> dict[str, Any]:
    swapped = [runs_of(np.arange(16, 32)), runs_of(np.arange(16))]
    return {"plan": plan_routes(made.layout, dist.get_rank(), picture.tokens, swapped)}


def foreign_plan(made: RoutedBridge, picture: Picture) -> dict[str, Any]:
    return {"plan": plan_routes(made.layout, 3, picture.tokens, [16, 16])}


def changed_rows(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., dict[str, Any]]:
    return lambda made, picture: {"rows": change(picture.rows[picture.mine].clone())}


@pytest.mark.parametrize("guard", ["always", "first"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            changed_rows(lambda x: x.requires_grad_()),
            r"the rows need a gradient must be .* False on ranks 0-1, 3; True on rank 2\. Freeze",
        ),
        (
            changed_rows(lambda x: x.float()),
            r"dtype must be the same on all of them, got torch.float64 on ranks 0-1, 3; "
            r"torch.float32 on rank 2\. Cast",
        ),
        (
            changed_rows(lambda x: x[:, :2]),
            r"width must be .* got 3 on ranks 0-1, 3; 2 on rank 2\. Project",
        ),
        (changed_rows(lambda x: x[1:]), r"rank 2 brings 15, the plan expects 16\. Give"),
        (other_plan, r"token positions .*, got \w{16} on ranks 0-1, 3; \w{16} on rank 2\. Plan"),
        (other_assignment, r"rows per encoder replica .* on ranks 0-1, 3; \w{16} on rank 2\. As"),
        (foreign_plan, r"nothing was moved\. rank 2: the plan is for rank 3; plan each rank's"),
        (lambda *_: {"problem": "no images today"}, r"moved\. rank 2: no images today$"),
    ],
)  # fmt: skip
def test_a_mismatch_is_one_error_on_every_rank(change, message, guard):
    """Rank 2 is the odd one, in the first of two exchange groups of 4."""

    def body(rank: int) -> None:
        with bridge(*FAN_IN, guard=guard) as made:
            picture = Picture(made, FULL)
            stated = {"plan": picture.plan(made), "rows": picture.rows[picture.mine]}
            made.confirm(**stated | (change(made, picture) if rank == 2 else {}))
            # The other group is not concerned: it says so by another error.
            assert rank >= 4
            raise ValueError("fine")

    found = errors(8, body)
    assert found[4:] == ["fine"] * 4
    assert len(set(found[:4])) == 1
    assert found[0].startswith("Bridge images -> language, exchange group of ranks 0-3: ")
    assert re.search(message, found[0]), found[0]


@pytest.mark.parametrize("guard", ["off", "first"])
def test_where_nothing_is_compared_a_rank_with_a_problem_raises_alone(guard):
    def body(rank: int) -> None:
        with bridge(*FAN_IN, guard=guard) as made:
            picture = Picture(made, FULL)
            plan, rows = picture.plan(made), picture.rows[picture.mine]
            made.confirm(plan, rows)
            made.confirm(plan, rows, "no" if rank == 5 else None)
            raise ValueError("fine")

    assert errors(8, body) == ["fine"] * 5 + ["Bridge images -> language: no"] + ["fine"] * 2


def test_a_rank_with_a_problem_stops_those_that_plan_with_it():
    def body(rank: int) -> None:
        with bridge(*FAN_IN) as made:
            picture = Picture(made, FULL)
            rows = picture.rows[picture.mine]
            made.plan(picture.own_tokens, rows, problem="no images" if rank == 2 else None)
            raise ValueError("fine")

    start = "Bridge images -> language, exchange group of ranks 0-3: nothing was moved. "
    assert errors(8, body) == [start + "rank 2: no images"] * 4 + ["fine"] * 4


def test_a_plan_on_some_ranks_only():
    def body(rank: int) -> None:
        with bridge(*FAN_IN) as made:
            picture = Picture(made, FULL)
            rows = picture.rows[picture.mine]
            if rank in (3, 7):
                made.confirm(picture.plan(made), rows)
            made.plan(picture.own_tokens, rows)

    found = errors(8, body)
    assert len(set(found[:4])) == 1
    assert (
        "plan was made ahead must be the same on all of them, got no on ranks 0-2; yes on"
        in found[0]
    )


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        (
            (2, 3),
            r"Number of images tokens \(32\) does not match number of images embeddings \(31\) in "
            r"the exchange group of 4 ranks that starts at rank 0: tokens per language replica "
            r"\[32\], rows per images replica \[16, 15\]; the sums",
        ),
        (
            (3,),
            r"ranks 2-3 are copies of one replica and must have the same rows, but those of rank "
            r"3 differ from those of rank 2 \(15 and 16\)",
        ),
    ],
)
def test_rows_that_do_not_match_the_tokens(odd, message):
    def body(rank: int) -> None:
        with bridge(*FAN_IN) as made:
            picture = Picture(made, FULL)
            made.plan(picture.own_tokens, picture.rows[picture.mine][int(rank in odd) :])
            raise ValueError("fine")

    found = errors(8, body)
    assert len(set(found[:4])) == 1
    assert re.search(message, found[0]), found[0]
    assert found[4:] == ["fine"] * 4


def test_copies_of_a_replica_with_other_tokens():
    def body(rank: int) -> None:
        with bridge(*FAN_IN) as made:
            picture = Picture(made, FULL)
            other = TokenRuns.from_mask(np.ones((1, 32), dtype=bool))
            tokens = other if rank in (3, 7) else picture.own_tokens
            made.plan(tokens, picture.rows[picture.mine])

    found = errors(8, body)
    assert len(set(found[:4])) == 1
    assert (
        "ranks 0-3 are copies of one replica and must have the same token positions, but"
        in found[0]
    )


@pytest.mark.parametrize(
    ("stretches", "messages"), [(25, 1), (26, 2), (160, 2)], ids=["full", "one_over", "many"]
)
def test_scattered_tokens_take_a_second_message(stretches, messages):
    """More stretches of tokens than fit the first message; batches seen before are remembered.

    It has place for 25. The other exchange group's language replica has one.
    """
    masks = np.zeros((2, 320), dtype=bool)
    masks[0, : 2 * stretches : 2] = masks[1, 7:10] = True
    world = InProcessWorld(8)

    @world.run
    def _(rank: int) -> None:
        with bridge(*FAN_IN) as made:
            picture = Picture(made, masks.reshape(2, 2, 160))
            rows = picture.rows[picture.mine]
            plan = made.plan(picture.own_tokens, rows)
            assert sum(world.counts(rank).values()) == (messages if rank < 4 else 1)
            assert made.plan(picture.own_tokens, rows) is plan
            picture.check(made, plan)


@pytest.mark.parametrize("scattered", [0, 1], ids=["first", "last"])
def test_ranks_with_few_places_take_the_second_message_too(scattered):
    """Of an exchange group's two language replicas one has more stretches than the first holds."""
    masks = np.zeros((4, 320), dtype=bool)
    masks[:, 7:10] = True
    masks[scattered::2, :60:2] = True

    @on_ranks(8)
    def _(rank: int) -> None:
        with bridge(*FAN_OUT) as made:
            Picture(made, masks.reshape(4, 2, 160)).check(made)


def test_places_that_just_fit_the_message_and_one_more():
    """A packed batch: 24 stretches and 2 or 3 cumulative lengths are 50 or 51 integers."""
    mask = np.zeros((1, 96), dtype=bool)
    mask[:, 1::4] = True
    for lengths, messages in (((0, 96), 1), ((0, 48, 96), 2)):
        world = InProcessWorld(8)

        @world.run
        def _(rank: int, lengths=lengths, messages=messages, world=world) -> None:
            with bridge(*FAN_IN) as made:
                picture = Picture(made, [mask] * 2)
                tokens = TokenRuns.from_mask(mask, lengths)
                rows = picture.rows[picture.mine]
                plan = made.plan(tokens, rows)
                assert sum(world.counts(rank).values()) == messages
                ahead = plan_routes(made.layout, rank, [tokens], picture.held)
                assert plan.digest() == ahead.digest()


def test_batches_alike_but_for_who_holds_which_rows_are_planned_anew():
    """The same token places; 20 and 12 rows instead of 16 and 16, then items in another order."""
    orders = [[runs_of(np.arange(16)), runs_of(np.arange(16, 32))]]
    orders.append(orders[0][::-1])

    @on_ranks(8)
    def _(rank: int) -> None:
        with bridge(*FAN_IN) as made:
            for cut in (16, 20):
                picture = Picture(made, FULL, cuts=[cut])
                picture.check(made)
            picture = Picture(made, FULL)
            for held in orders:
                rows = picture.rows[expand(held[picture.group.src_of[picture.group.index(rank)]])]
                plan = made.plan(picture.own_tokens, rows, held=held)
                ahead = plan_routes(made.layout, rank, picture.tokens, held)
                assert plan.digest() == ahead.digest()


def test_indices_are_those_of_the_device_that_asks():
    @on_ranks(8)
    def _(rank: int) -> None:
        with bridge(*FAN_IN) as made:
            plan = Picture(made, FULL).plan(made)
            here = made.tensors(plan, torch.device("cpu"))
            assert made.tensors(plan, torch.device("cpu")) is here
            made._tensors[plan] = torch.device("meta"), here
            assert made.tensors(plan, torch.device("cpu")) is not here


def test_the_group_for_host_tensors_is_released_too(monkeypatch):
    """Where rows travel over another backend than what the ranks tell each other."""
    released = []
    monkeypatch.setattr(routed_bridge, "release_group", released.append)

    @on_ranks(8)
    def _(rank: int) -> None:
        with bridge(*FAN_IN) as made:
            made.control, shared = object(), made.control
            mine = made.group, made.control
            assert shared is made.group
            made.destroy()
            assert released[-2:] == list(mine)


@pytest.mark.parametrize(("stretches", "messages"), [(23, 1), (24, 2)], ids=["full", "one_over"])
def test_lengths_and_stretches_share_the_first_message(stretches, messages):
    """Four cumulative lengths leave place for 23 stretches."""
    mask = np.zeros((1, 160), dtype=bool)
    mask[0, : 2 * stretches : 2] = True
    tokens, world = TokenRuns.from_mask(mask, [0, 40, 96, 160]), InProcessWorld(8)

    @world.run
    def _(rank: int) -> None:
        with bridge(*FAN_IN) as made:
            held = split_items(stretches, 2)[made.layout.src_dp[rank] % 2]
            plan = made.plan(tokens, torch.zeros(len(held), HIDDEN))
            assert sum(world.counts(rank).values()) == messages
            assert plan.tokens.cu_seqlens == tokens.cu_seqlens
            assert np.array_equal(plan.tokens.runs, tokens.runs)


def test_plans_of_other_rows_and_dead_bridges_are_refused():
    @on_ranks(8)
    def _(rank: int) -> None:
        with bridge(*FAN_IN) as made:
            picture = Picture(made, FULL)
            plan = picture.plan(made)
            with pytest.raises(ValueError, match=r"for 16 rows of this rank, got .* \(15, 3\)"):
                made.move(picture.rows[picture.mine][1:], plan)
            made.destroy()
            made.destroy()
            with pytest.raises(RuntimeError, match="was destroyed"):
                made.move(picture.rows[picture.mine], plan)


@pytest.mark.parametrize(
    ("backend", "takes"), [("gloo", True), ("nccl", False), ("cpu:gloo,cuda:nccl", True)]
)
def test_which_backends_need_another_group_for_the_comparison(backend, takes):
    assert takes_host_tensors(backend) == takes


@pytest.mark.parametrize(
    ("src", "dest", "common"),
    [(None, None, None), ("a", None, "a"), (None, "a", "a"), ("a", "a", "a")],
)
def test_a_backend_that_one_grid_names_is_both_ones(src, dest, common):
    assert common_backend(SimpleNamespace(backend=src), SimpleNamespace(backend=dest)) == common
    with pytest.raises(ValueError, match="Grids must have the same backend: src='a', dest='b'"):
        common_backend(SimpleNamespace(backend="a"), SimpleNamespace(backend="b"))


def test_an_unknown_guard_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    grids = HyperCommGrid([8, 1], ["tp", "dp"]), HyperCommGrid([8, 1, 1], ["tp", "cp", "dp"])
    with pytest.raises(ValueError, match=r"\('always', 'first', 'off'\), got 'sometimes'"):
        RoutedBridge(*grids, guard="sometimes")


@pytest.mark.parametrize("done", ["never arrived", "never went back", "went back"])
def test_nothing_keeps_an_exchange(done: str) -> None:
    """Autograd's graph has it, and Python collects no cycle that passes through the graph."""
    plan = PlanTensors(
        *(2, 2, 2, None, None, False), torch.tensor([1, 0]), *(torch.arange(0) for _ in range(4))
    )
    rows = torch.ones(2, 3, requires_grad=True)
    flight = issue_exchange(rows, plan, None)
    kept = weakref.ref(flight)
    if done != "never arrived":
        arrived = flight.arrive()
        if done == "went back":
            arrived.sum().backward()
        del arrived
    del flight
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize(
    ("case", "direction"),
    [(FAN_IN, (True, False)), (FAN_OUT, (False, True)), (EQUAL, (False, False))],
)
def test_a_bridge_knows_which_side_has_more_replicas(case: Any, direction: Any) -> None:
    def body(_rank: int) -> tuple[bool, bool]:
        with bridge(*case) as made:
            return made.is_fan_in(), made.is_fan_out()

    assert InProcessWorld(8).run(body) == [direction] * 8


def test_groups_of_a_backend_that_takes_no_host_tensors_have_another_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As NCCL's: what ranks tell each other is on the host."""
    monkeypatch.setattr(routed_bridge, "takes_host_tensors", lambda _backend: False)

    def body(_rank: int) -> list[bool]:
        with bridge(*FAN_IN) as made:
            two = made.group is not None and made.control not in (None, made.group)
            made.destroy()
            return [two, made.group is None, made.control is None]

    assert InProcessWorld(8).run(body) == [[True] * 3] * 8
