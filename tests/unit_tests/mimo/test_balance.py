# SPDX-License-Identifier: Apache-2.0
"""Encoder items balanced over replicas: the assignment against brute force (pure integers); the
moved pixels, their rows and the encoder's gradient against the unsharded computation, and the
guard (ranks as threads of one process)."""

from __future__ import annotations

import doctest
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from megatron.core.models.mimo.comm import exchange, item_exchange
from megatron.core.models.mimo.comm.input_balance import InputBalance
from megatron.core.models.mimo.comm.item_exchange import ItemExchange
from megatron.core.models.mimo.comm.plan import balance as balance_module
from megatron.core.models.mimo.comm.plan.balance import (
    BalancePlan,
    EncoderBalance,
    TokenCost,
    plan_balance,
)
from megatron.core.models.mimo.comm.plan.item_moves import plan_item_moves
from megatron.core.models.mimo.comm.plan.token_runs import expand
from tests.unit_tests.mimo.balanced_cases import LINEAR, check_balanced_encoder
from tests.unit_tests.mimo.in_process_ranks import InProcessWorld
from tests.unit_tests.mimo.routed_cases import EQUAL, FAN_IN, FAN_OUT, bridge, random_masks

pytestmark = pytest.mark.once


def loads(plan: BalancePlan, costs: np.ndarray) -> list[int]:
    return [int(costs[items].sum()) for items in plan.assignment]


def lightest_first(costs: list[int], replicas: int) -> list[int]:
    """Longest processing time first, by searching."""
    load, replica = [0] * replicas, [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        replica[item] = min(range(replicas), key=lambda r: (load[r], r))
        load[replica[item]] += costs[item]
    return replica


def test_assignment_is_greedy_and_near_the_best() -> None:
    """Its work is at most 4/3 - 1/(3 m) of the best for m replicas (Graham 1969)."""
    generator = np.random.default_rng(0)
    moved = 0
    for _ in range(60):
        replicas = int(generator.integers(1, 4))
        tokens = generator.integers(0, 9, size=int(generator.integers(1, 7)))
        counts = np.bincount(generator.integers(replicas, size=tokens.size), minlength=replicas)
        plan = plan_balance(tokens, counts, LINEAR)
        assert sorted(np.concatenate(plan.assignment).tolist()) == list(range(tokens.size))
        home = np.repeat(np.arange(replicas), counts)
        mean = tokens.sum() / replicas
        at_home = np.bincount(home, weights=tokens, minlength=replicas)
        assert plan.before == (pytest.approx(at_home.max() / mean) if mean else 1)
        assert plan.after == (pytest.approx(max(loads(plan, tokens)) / mean) if mean else 1)
        if plan.moves:
            assert plan.after < plan.before
            assert plan.replica.tolist() == lightest_first(tokens.tolist(), replicas)
        options = itertools.product(range(replicas), repeat=tokens.size)
        best = min(np.bincount(o, weights=tokens, minlength=replicas).max() for o in options)
        assert max(loads(plan, tokens)) <= (4 / 3 - 1 / (3 * replicas)) * best + 1e-9
        moved += plan.moves
    assert moved >= 20


def test_default_cost_and_rows_held() -> None:
    plan = plan_balance([100, 4, 3, 2, 1], [2, 2, 1], EncoderBalance(cost=TokenCost(k=10)))
    # 11000, 56, 39, 24, 11: the first alone, then 56 | 39, then 24 to the 39, 11 to the 56.
    assert [items.tolist() for items in plan.assignment] == [[0], [1, 4], [2, 3]]
    assert [expand(rows).tolist() for rows in plan.held_rows()] == [
        list(range(100)),
        [100, 101, 102, 103, 109],
        [104, 105, 106, 107, 108],
    ]


@pytest.mark.parametrize(
    ("tokens", "counts", "balance"),
    [
        ([5, 4], [1, 1], EncoderBalance(threshold=1.2, cost=LINEAR.cost)),  # 5 / 4.5
        ([6, 2], [2, 0], EncoderBalance(threshold=2, cost=LINEAR.cost)),  # 2, just as allowed
        ([30, 24, 26, 20], [2, 2], EncoderBalance(cost=LINEAR.cost)),  # 1.08: allowed by default
        ([9, 1], [1, 1], LINEAR),  # nothing better: one heavy item
        ([], [0, 0], LINEAR),
        ([0, 0], [2, 0], LINEAR),
        ([7, 7, 7], [3], LINEAR),
    ],
)
def test_items_stay_at_home(tokens: list[int], counts: list[int], balance: EncoderBalance) -> None:
    plan = plan_balance(tokens, counts, balance)
    assert not plan.moves
    assert plan.before == plan.after
    assert [len(items) for items in plan.assignment] == counts


def test_digest_tells_plans_apart() -> None:
    """Also where only the number of replicas without items differs."""
    cases = [([5, 1], [2, 0]), ([5, 2], [2, 0]), ([5, 1], [1, 1]), ([5, 1], [2, 0, 0])]
    digests = {plan_balance(*case, LINEAR).digest() for case in cases}
    assert len(digests) == len(cases)
    assert plan_balance(*cases[0], LINEAR).digest() in digests
    plan = plan_balance([5, 1], [2, 0], LINEAR)
    for name in ("tokens", "home", "replica"):
        other = replace(plan, **{name: getattr(plan, name) + 1})
        assert other.digest() != plan.digest(), name
    assert replace(plan, replicas=3).digest() != plan.digest()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: EncoderBalance(threshold=0.9), "threshold must be at least 1 .* got 0.9"),
        (lambda: plan_balance([1, 2], [1]), r"items_per_replica \[1\] sums to 1, but .* 2 items"),
        (lambda: plan_balance([1, 2], [3, -1]), r"items_per_replica \[3, -1\] sums to 2"),
        (
            lambda: plan_balance([1, 2], [2], EncoderBalance(cost=lambda t: t.sum())),
            r"returned shape \(\) for 2 items",
        ),
        (
            lambda: plan_balance([1, 4], [2], EncoderBalance(cost=lambda t: 2.0 - t)),
            "returned -2.0 for item 1 of 4 tokens",
        ),
        (
            lambda: InputBalance(None, EncoderBalance()),
            "EncoderBalance needs tokens_per_item, a function of a modality's encoder inputs",
        ),
        (
            lambda: plan_item_moves(plan_balance([1, 2], [2]), None, 0, [1]),
            "units_per_item has 1 numbers, the plan has 2 items; give the units of all items",
        ),
    ],
)
def test_errors(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_examples() -> None:
    outcome = doctest.testmod(balance_module)
    assert outcome.attempted
    assert not outcome.failed


# -- ranks -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("src", "dest", "options"),
    [
        (*FAN_IN, {}),
        (*FAN_OUT, {"one_group": True}),
        (*EQUAL, {"one_group": True, "sequence_parallel": True}),
        ((1, 8), (2, 4, 1), {}),
    ],
)
def test_gradients_are_those_of_the_unsharded_encoder(
    src: tuple[int, int], dest: tuple[int, int, int], options: dict[str, Any]
) -> None:
    def body(rank: int) -> tuple[float, float]:
        with bridge(src, dest, **options) as made:
            return check_balanced_encoder(made, random_masks(dest[2], 64))

    spreads = InProcessWorld(8).run(body)
    # A group whose language replica has no tokens has nothing to balance.
    assert all(after < before or before == 1 for before, after in spreads)
    assert any(after < before for before, after in spreads)


def test_packed_inputs_move_item_by_item() -> None:
    """Patches of images of several sizes, packed along dim 0, beside one size for each image."""
    patches, tokens = [3, 1, 4, 2, 6], [4, 1, 9, 3, 7]  # neither is a multiple of the other
    ends = np.cumsum([0, *patches])
    pixels = torch.arange(2.0 * ends[-1]).view(-1, 2)
    balance = EncoderBalance(
        threshold=1,
        cost=LINEAR.cost,
        tokens_per_item=lambda inputs: inputs["vit"]["tokens"],
        units_per_item=lambda inputs: inputs["vit"]["sizes"],
    )
    everything = {"pixels": pixels, "sizes": torch.tensor(patches), "tokens": torch.tensor(tokens)}

    def body(rank: int) -> np.ndarray:
        with bridge((2, 4), (2, 4, 1)) as made:
            inputs = {"vit": everything} if rank < 2 else None  # the first replica reads all
            encodes, plan = InputBalance(made, balance).balance(inputs, pixels.device)
            items = plan.assignment[rank // 2]
            units = expand(np.stack([ends[items], np.array(patches)[items]], axis=1))
            assert torch.equal(encodes["vit"]["pixels"], pixels[units])
            for name in ("sizes", "tokens"):
                assert torch.equal(encodes["vit"][name], everything[name][items])
            return items

    found = InProcessWorld(8).run(body)
    assert [items.tolist() for items in found[::2]] == [[2], [4], [0], [1, 3]]


@pytest.mark.parametrize(("guard", "compared"), [("always", 2), ("first", 1), ("off", 0)])
def test_how_often_ranks_compare_what_they_move(guard: str, compared: int) -> None:
    world = InProcessWorld(8)

    def body(rank: int) -> None:
        with bridge((2, 4), (2, 4, 1)) as made:
            items = ItemExchange(made, LINEAR, guard=guard)
            plan = plan_balance([3, 1], [2, 0, 0, 0], LINEAR)
            for _ in range(2):
                moved = items.move(torch.ones(2 if rank < 2 else 0, 3), plan)
                assert len(moved) == len(plan.assignment[rank // 2])
            found = {name: count for (name, _), count in world.counts(rank).items()}
            assert found.get("all_gather", 0) == compared
            if guard == "off":
                with pytest.raises(ValueError, match=f"^Rank {rank} brings 3 units of images"):
                    items.move(torch.ones(3, 3), plan)

    world.run(body)
    with pytest.raises(ValueError, match="guard must be one of .* got 'never'"):
        ItemExchange(None, guard="never")


@pytest.mark.parametrize(
    "name", ["images", "\u5716" * 200, 'a"' * 200], ids=["short", "wide", "quoted"]
)
def test_a_problem_fits_the_message_whatever_the_modality_is_called(name: str) -> None:
    """And shapes that begin alike are told apart, however long they are."""

    def body(rank: int) -> tuple[str, str]:
        with bridge((2, 4), (2, 4, 1)) as made:
            items, told = ItemExchange(made, LINEAR), []
            items.name = name
            plan = plan_balance([3, 1], [2, 0, 0, 0], LINEAR)
            shape, read = (1,) * 60, 2 if rank < 2 else 0
            for units in (
                torch.zeros(1 if rank == 3 else read, 3),
                torch.zeros(read, *shape, 2 if rank == 5 else 1),
            ):
                with pytest.raises(ValueError) as raised:
                    items.move(units, plan)
                told.append(str(raised.value))
            return tuple(told)

    ((problem, shapes),) = set(InProcessWorld(8).run(body))
    assert problem.startswith(f"Rank 3 brings 1 units of {name[:15]}")
    assert "item shape differs: (1, 1, " in shapes
    assert shapes.count("on ranks [5]") == 1


def told_to_all(change: Callable[[int, dict[str, Any]], None]) -> str:
    """The error that every rank of an exchange group gets when one rank's call is changed."""

    def body(rank: int) -> str:
        with bridge((2, 4), (2, 4, 1)) as made:
            items, mine = ItemExchange(made, LINEAR), rank // 2
            call = {
                "units": torch.zeros(2 if mine == 0 else 0, 3, 4),
                "plan": plan_balance([3, 1], [2, 0, 0, 0], LINEAR),
            }
            change(rank, call)
            with pytest.raises(ValueError) as raised:
                items.move(**call)
            return str(raised.value)

    messages = set(InProcessWorld(8).run(body))
    assert len(messages) == 1
    return messages.pop()


def test_a_rank_that_does_otherwise_is_named_on_all() -> None:
    def other_plan(rank: int, call: dict[str, Any]) -> None:
        if rank == 5:
            call["plan"] = plan_balance([3, 2], [2, 0, 0, 0], LINEAR)

    def other_dtype(rank: int, call: dict[str, Any]) -> None:
        if rank in (6, 7):
            call["units"] = call["units"].half()

    def other_shape(rank: int, call: dict[str, Any]) -> None:
        if rank == 2:
            call["units"] = torch.zeros(0, 3)

    def too_many(rank: int, call: dict[str, Any]) -> None:
        if rank == 3:
            call["units"] = torch.zeros(1, 3, 4)

    assert "images: plan differs: " in (told := told_to_all(other_plan))
    assert "on ranks [0, 1, 2, 3, 4, 6, 7]" in told
    assert "on ranks [5]" in told
    assert "dtype differs: torch.float32 on ranks [0, 1, 2, 3, 4, 5], torch.float16 on" in (
        told_to_all(other_dtype)
    )
    assert "item shape differs: (3, 4) on" in (told := told_to_all(other_shape))
    assert "(3,) on ranks [2]" in told
    assert told_to_all(too_many) == "Rank 3 brings 1 units of images, planned are 0"


def test_how_often_the_guard_compares() -> None:
    plan = plan_balance([3, 1], [2, 0, 0, 0], LINEAR)
    world = InProcessWorld(8)

    def body(rank: int) -> dict[str, list[int]]:
        counts: dict[str, list[int]] = {}
        for guard in ("always", "first", "off"):
            with bridge((2, 4), (2, 4, 1)) as made:
                items = ItemExchange(made, LINEAR, guard=guard)
                units, counts[guard] = torch.zeros(2 if rank < 2 else 0, 3), []
                for _ in range(2):
                    before = world.counts(rank).get(("all_gather", tuple(range(8))), 0)
                    items.move(units, plan)
                    after = world.counts(rank).get(("all_gather", tuple(range(8))), 0)
                    counts[guard].append(after - before)
        return counts

    assert world.run(body) == [{"always": [1, 1], "first": [1, 0], "off": [0, 0]}] * 8


def test_one_rank_packs_what_others_have_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of one patch each are packed, too: the units say so, not the sizes of one rank.

    The indices of both kinds of tensors go to the device together.
    """
    uploads: list[int] = []

    def to_device(arrays: list[np.ndarray], device: torch.device) -> list[torch.Tensor]:
        uploads.append(len(arrays))
        return exchange.to_device(arrays, device)

    monkeypatch.setattr(item_exchange, "to_device", to_device)
    patches = {0: [4, 2, 1], 1: [1, 1], 2: [0, 2]}
    balance = EncoderBalance(
        tokens_per_item=lambda inputs: inputs["vit"]["sizes"].tolist(),
        units_per_item=lambda inputs: inputs["vit"]["sizes"].tolist(),
        cost=LINEAR.cost,
        threshold=1,
    )

    def body(rank: int) -> tuple[list[int], list[float]]:
        with bridge((2, 4), (2, 4, 1)) as made:
            sizes = torch.tensor(patches.get(rank // 2, []), dtype=torch.int64)
            values = 100.0 * (rank // 2) + torch.arange(int(sizes.sum()))
            inputs = {"vit": {"pixels": values.view(-1, 1), "sizes": sizes}}
            given = inputs if len(sizes) else None
            moved, plan = InputBalance(made, balance).balance(given, torch.device("cpu"))
            assert plan.moves
            if moved is None:
                return [], []
            vit = moved["vit"]
            return vit["sizes"].tolist(), vit["pixels"].flatten().tolist()

    found = InProcessWorld(8).run(body)[::2]
    assert uploads == [4] * 8
    # 4 | 2 | 2 | 1 1 1 0, heaviest first to the least loaded; items ascend on each replica.
    assert sorted(sum((sizes for sizes, _ in found), [])) == [0, 1, 1, 1, 2, 2, 4]
    assert all(len(pixels) == sum(sizes) for sizes, pixels in found)
    assert sorted(sum((pixels for _, pixels in found), [])) == [
        *(0, 1, 2, 3, 4, 5, 6),
        *(100, 101),
        *(200, 201),
    ]


def test_the_spread_is_of_the_last_batch_whether_items_move_or_not() -> None:
    """Also of the first batch, of one below the threshold and of one without items."""
    balance = EncoderBalance(
        tokens_per_item=lambda inputs: inputs["vit"]["sizes"].tolist(),
        threshold=1.5,
        cost=LINEAR.cost,
    )
    even, uneven = {dp: [2] for dp in range(4)}, {0: [4, 2, 1]}
    batches = [even, uneven, {**even, 0: [3]}, uneven, {}]

    def body(rank: int) -> list[tuple[bool, float, float]]:
        told = []
        with bridge((2, 4), (2, 4, 1)) as made:
            balancing = InputBalance(made, balance)
            assert balancing.spread is None
            for batch in batches:
                sizes = torch.tensor(batch.get(rank // 2, []), dtype=torch.int64)
                given = {"vit": {"sizes": sizes}} if len(sizes) else None
                _, plan = balancing.balance(given, torch.device("cpu"))
                assert balancing.spread is not None
                told.append((plan.moves, *balancing.spread))
        return told

    moved = (True, 4, pytest.approx(16 / 7))
    below = pytest.approx(4 / 3)
    expected = [(False, 1, 1), moved, (False, below, below), moved, (False, 1, 1)]
    assert InProcessWorld(8).run(body) == [expected] * 8


def test_rows_that_may_be_of_items_or_of_units_are_refused() -> None:
    """As many units as items, but not one each: the sizes would go where the patches go."""
    balance = EncoderBalance(
        tokens_per_item=lambda inputs: [8, 1], units_per_item=lambda inputs: [2, 0]
    )

    def body(rank: int) -> str:
        with bridge((2, 4), (2, 4, 1)) as made:
            inputs = {"vit": {"x": torch.ones(2, 3)}} if rank < 2 else None
            with pytest.raises(ValueError, match="cannot tell whether x of vit has one") as raised:
                InputBalance(made, balance).balance(inputs, torch.device("cpu"))
            return str(raised.value)

    assert len(set(InProcessWorld(8).run(body))) == 1


def test_other_arguments_must_be_alike() -> None:
    balance = EncoderBalance(
        tokens_per_item=lambda inputs: [9, 1, 1] if len(inputs["vit"]["x"]) == 3 else [1],
        cost=LINEAR.cost,
    )

    def body(rank: int) -> str:
        with bridge((2, 4), (2, 4, 1)) as made:
            count = {0: 3, 1: 1}.get(rank // 2, 0)
            inputs = {"vit": {"x": torch.ones(count, 2), "crop": rank // 2}} if count else None
            with pytest.raises(ValueError, match="all ranks give the same arguments") as raised:
                InputBalance(made, balance).balance(inputs, torch.device("cpu"))
            return str(raised.value)

    assert len(set(InProcessWorld(8).run(body))) == 1


def test_other_arguments_go_to_those_that_read_nothing() -> None:
    balance = EncoderBalance(tokens_per_item=lambda _: [9, 1], cost=LINEAR.cost, threshold=1)

    def body(rank: int) -> Any:
        with bridge(*FAN_IN) as made:
            inputs = {"vit": {"x": torch.ones(2, 3), "crop": "middle"}} if rank % 4 < 2 else None
            moved, plan = InputBalance(made, balance).balance(inputs, torch.device("cpu"))
            assert plan.moves
            return moved["vit"]["crop"], len(moved["vit"]["x"])

    assert InProcessWorld(8).run(body) == [("middle", 1)] * 8


PROBLEMS = {
    "units of": ({"units_per_item": lambda _: [1]}, "has units of 1 items and tokens of 2"),
    "length": (
        {"units_per_item": lambda _: [2, 3]},
        r"has x of vit with 4 along dim 0; wanted one per item \(2\) or per unit \(5\)",
    ),
    "scalar": ({}, r"has size of vit with -1 along dim 0; wanted one per item \(2\)"),
    "raises": ({"tokens_per_item": lambda _: {}["rows"]}, r"cannot describe its inputs: KeyError"),
}


@pytest.mark.parametrize("kind", PROBLEMS)
def test_inputs_that_do_not_go_with_their_items_are_named_on_all(kind: str) -> None:
    wrong, said = PROBLEMS[kind]
    given = {"tokens_per_item": lambda _: [9, 1], **wrong}

    def body(rank: int) -> str:
        with bridge(*FAN_IN) as made:
            x = torch.ones(4 if kind == "length" else 2, 3)
            vit = {"x": x, **({"size": torch.tensor(3)} if kind == "scalar" else {})}
            inputs = {"vit": vit} if rank % 4 < 2 else None
            with pytest.raises(ValueError, match=said) as raised:
                InputBalance(made, EncoderBalance(**given)).balance(inputs, torch.device("cpu"))
            return str(raised.value)

    found = InProcessWorld(8).run(body)
    for ranks in (range(4), range(4, 8)):  # the two exchange groups
        (sentence,) = {found[rank] for rank in ranks}
        assert sentence.startswith(f"Balancing images: rank {ranks[0]} ")
        assert f"; rank {ranks[1]} " in sentence


def test_a_replica_alone_plans_what_it_reads() -> None:
    """And a group in which nobody reads anything plans that."""

    def alone(rank: int) -> tuple[list[int], bool]:
        with bridge((1, 2), (1, 1, 2)) as made:
            plan = ItemExchange(made).plan([4, 9] if rank else [])
            return plan.tokens.tolist(), plan.moves

    assert InProcessWorld(2).run(alone) == [([], False), ([4, 9], False)]

    def nothing(rank: int) -> list[int]:
        with bridge(*FAN_IN) as made:
            return ItemExchange(made).plan([]).tokens.tolist()

    assert InProcessWorld(8).run(nothing) == [[]] * 8


def test_all_tensors_are_moved_over_the_group_of_the_device(monkeypatch) -> None:
    """A loader may leave sizes on the host, and the group may be one of an accelerator's."""
    balance = EncoderBalance(tokens_per_item=lambda inputs: [9, 1, 1], cost=LINEAR.cost)
    inputs = {"vit": {"pixels": torch.ones(3, 4), "sizes": torch.ones(3, dtype=torch.int64)}}
    sent = []

    def body(rank: int) -> None:
        with bridge(*FAN_IN) as made:
            balancing = InputBalance(made, balance)
            moves = lambda value, *_: sent.append((rank, value.device.type))  # noqa: E731
            monkeypatch.setattr(balancing._items, "move", moves)
            balancing.balance(inputs if rank in (0, 1) else None, torch.device("meta"))

    InProcessWorld(8).run(body)
    # Two arguments, over all ranks of the exchange group that reads items.
    assert sorted(sent) == [(rank, "meta") for rank in (0, 1, 2, 3) for _ in inputs["vit"]]


@pytest.mark.parametrize("more", [4, 0])
def test_copies_of_a_replica_that_read_other_items_are_named(more: int) -> None:
    """Also by an item that becomes no rows."""

    def body(rank: int) -> str:
        with bridge((2, 4), (2, 4, 1)) as made:
            items = ItemExchange(made)
            with pytest.raises(ValueError) as raised:
                items.plan([4, more] if rank == 3 else [4])
            return str(raised.value)

    messages = set(InProcessWorld(8).run(body))
    assert len(messages) == 1
    assert messages.pop().startswith("Ranks [3] read images of other tokens than rank 2,")


def test_copies_that_cut_their_items_into_other_units_are_named() -> None:
    """Item by item they agree; each would send what its own units say."""

    def body(rank: int) -> str:
        balance = EncoderBalance(
            tokens_per_item=lambda _: [4, 4],
            units_per_item=lambda _: [1, 2] if rank == 3 else [2, 1],
        )
        with bridge((2, 4), (2, 4, 1)) as made:
            inputs = {"vit": {"x": torch.ones(3, 2)}}
            with pytest.raises(ValueError) as raised:
                InputBalance(made, balance).balance(inputs, torch.device("cpu"))
            return str(raised.value)

    (message,) = set(InProcessWorld(8).run(body))
    assert "ranks [2, 3] are copies of one encoder replica and must read the same" in message
    assert "tokens are [[4, 4], [4, 4]] and units [[2, 1], [1, 2]]" in message
