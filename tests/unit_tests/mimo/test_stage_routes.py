# SPDX-License-Identifier: Apache-2.0
"""Routes to the first of several pipeline stages, and of several microbatches: pure integers.

The oracle is that of ``test_routes``: every row placed by the rule in words.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from megatron.core.hyper_comm_grid import GridShape
from megatron.core.models.mimo.comm.plan.merged_routes import MergedPlan
from megatron.core.models.mimo.comm.plan.routed_layout import RouteLayout
from megatron.core.models.mimo.comm.plan.routes import RoutePlan, plan_routes
from megatron.core.models.mimo.comm.plan.token_runs import TokenRuns
from tests.unit_tests.mimo.test_routes import World, check, move, plan_all, random_tokens

pytestmark = pytest.mark.once

POWERS = (1, 2, 4, 8)
# (tp, dp) of the encoder, (tp, cp, pp, dp) of the language model.
PAIRS = [
    ((src_tp, 8 // src_tp), (tp, cp, pp, 8 // (tp * cp * pp)))
    for src_tp, tp, cp, pp in itertools.product(POWERS, POWERS, POWERS, (2, 4, 8))
    if 8 % (tp * cp * pp) == 0
]
# Where the stages' ranks lie: stages far apart, as stock orders them, or side by side.
ORDERS = [("tp", "cp", "dp", "pp"), ("tp", "cp", "pp", "dp"), ("pp", "cp", "tp", "dp")]


def grids(
    src: tuple[int, int], dest: tuple[int, int, int, int], order: tuple[str, ...]
) -> tuple[GridShape, GridShape]:
    sizes = dict(zip(("tp", "cp", "pp", "dp"), dest, strict=True))
    return GridShape(src, ("tp", "dp")), GridShape([sizes[dim] for dim in order], order)


def world(
    generator: np.random.Generator,
    src: tuple[int, int],
    dest: tuple[int, int, int, int],
    order: tuple[str, ...] = ORDERS[0],
    *,
    sequence_parallel: bool = False,
    shares: Sequence[float] = (0.0, 0.3, 0.9),
) -> World:
    """Uneven tokens on the language replicas, cut anywhere between the encoder replicas."""
    tokens = [
        random_tokens(generator, 2, 2 * dest[0] * dest[1], generator.choice(shares))
        for _ in range(dest[3])
    ]
    rows = np.arange(sum(each.count for each in tokens))
    cuts = np.sort(generator.integers(0, rows.size + 1, src[1] - 1))
    return World(*grids(src, dest, order), sequence_parallel, tokens, np.split(rows, cuts))


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tp_copies", "sp"])
@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_every_layout_of_stages_against_the_oracle(order, sequence_parallel):
    generator = np.random.default_rng(11)
    for src, dest in PAIRS:
        made = world(generator, src, dest, order, sequence_parallel=sequence_parallel)
        plans = plan_all(made, one_group=True)
        check(made, plans)
        later = [rank for rank in plans if made.dest.coords(rank)["pp"] > 0]
        assert later
        assert all(plans[rank].own == 0 and plans[rank].backward.sent == 0 for rank in later)


def test_stages_side_by_side_keep_exchange_groups_small():
    """Stages inside a data-parallel replica exchange within it; far apart they join all of them."""
    src = GridShape((1, 8), ("tp", "dp"))
    near = GridShape((1, 2, 2, 2), ("tp", "cp", "pp", "dp"))
    far = GridShape((1, 2, 2, 2), ("tp", "cp", "dp", "pp"))
    groups = [
        [group.ranks.tolist() for group in RouteLayout.from_grids(src, dest).groups()]
        for dest in (near, far)
    ]
    assert groups == [[[0, 1, 2, 3], [4, 5, 6, 7]], [list(range(8))]]


@dataclass
class Step:
    """Several microbatches of one layout, and what each rank holds of all of them.

    Rows are labelled over the whole step, so that no two microbatches can be mixed up.
    """

    worlds: list[World]
    plans: list[dict[int, RoutePlan]]

    @property
    def merged(self) -> dict[int, MergedPlan]:
        return {rank: MergedPlan.of([each[rank] for each in self.plans]) for rank in self.plans[0]}

    def held(self, rank: int) -> np.ndarray:
        labels = [100 * m + np.array(w.held_by(rank), int) for m, w in enumerate(self.worlds)]
        return np.concatenate(labels)


class _WithRanks:
    """A merged plan beside the members that ``move`` asks a plan for."""

    def __init__(self, merged: MergedPlan, ranks: np.ndarray) -> None:
        self.forward, self.backward, self.ranks = merged.forward, merged.backward, ranks


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tp_copies", "sp"])
@pytest.mark.parametrize(
    ("src", "dest"),
    [
        pytest.param((1, 8), (1, 2, 2, 2), id="stages"),
        pytest.param((2, 4), (2, 2, 2, 1), id="stages_tp"),
        pytest.param((4, 2), (1, 2, 1, 4), id="fan_out"),
        pytest.param((1, 8), (1, 1, 1, 8), id="equal"),
    ],
)
def test_merged_routes_bring_every_microbatch_what_its_own_routes_do(src, dest, sequence_parallel):
    """Uneven microbatches; the first, one in the middle and the last without a single row."""
    generator = np.random.default_rng(4)
    options = {"sequence_parallel": sequence_parallel}
    worlds = [world(generator, src, dest, **options) for _ in range(3)]
    for place in (0, 2, 5):
        worlds.insert(place, world(generator, src, dest, **options, shares=(0.0,)))
    step = Step(worlds, [plan_all(each, one_group=True) for each in worlds])
    merged = step.merged
    moved = {rank: _WithRanks(plan, step.plans[0][rank].ranks) for rank, plan in merged.items()}
    held = {rank: step.held(rank) for rank in merged}
    arrived = move(moved, "forward", held)
    own = {r: np.concatenate([held[r][p.local_index], arrived[r]]) for r, p in merged.items()}
    for rank, plan in merged.items():
        assert plan.held == held[rank].size
        assert plan.own == own[rank].size
        for leg in ("forward", "backward"):
            moves = any(getattr(each[rank], leg).moves for each in step.plans)
            assert getattr(plan, leg).moves == moves
        for number, (each, part) in enumerate(zip(step.plans, plan.own_index, strict=True)):
            labels = (own[rank][part] - 100 * number).tolist()
            places = dict(zip(labels, each[rank].place.tolist(), strict=True))
            assert places == worlds[number].needed(rank)
    arrived = move(moved, "backward", own)
    for rank, plan in merged.items():
        gradient = np.full(plan.held, -1)
        gradient[plan.local_index] = own[rank][: plan.local_index.size]
        gradient[plan.backward_index] = arrived[rank]
        assert np.array_equal(gradient, held[rank])


def test_routes_of_one_microbatch_stay_as_they_are():
    made = world(np.random.default_rng(2), (2, 4), (2, 2, 2, 1), shares=(0.8,))
    plan = plan_all(made)[5]
    merged = MergedPlan.of([plan])
    assert np.array_equal(merged.own_index[0], np.arange(plan.own))
    for name in ("local_index", "backward_index"):
        assert np.array_equal(getattr(merged, name), getattr(plan, name))
    for name in ("send_index", "send_splits", "recv_splits", "moves"):
        for leg in ("forward", "backward"):
            found, wanted = (getattr(getattr(each, leg), name) for each in (merged, plan))
            assert np.array_equal(found, wanted)


def test_plans_that_do_not_belong_together_are_refused():
    generator = np.random.default_rng(2)
    plans = plan_all(world(generator, (1, 8), (1, 2, 2, 2)))
    with pytest.raises(ValueError, match="got those of rank 0 in .* and of rank 1 in"):
        MergedPlan.of([plans[0], plans[1]])
    with pytest.raises(ValueError, match="no plans to merge"):
        MergedPlan.of([])


def test_plans_of_two_exchange_groups_are_refused():
    """As many ranks, but others: rank 0 trades with rank 1 over one bridge, 2 over another."""
    plans = []
    for order in (("tp", "dp"), ("dp", "tp")):
        layout = RouteLayout.from_grids(GridShape([2, 2], order), GridShape([2, 2], order))
        plans.append(plan_routes(layout, 0, [TokenRuns.from_positions(np.arange(4), 1, 8)], [4]))
    assert [plan.ranks.tolist() for plan in plans] == [[0, 1], [0, 2]]
    with pytest.raises(ValueError, match=r"rank 0 in .*\[0, 1\].* of rank 0 in .*\[0, 2\]"):
        MergedPlan.of(plans)
