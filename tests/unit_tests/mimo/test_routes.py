# SPDX-License-Identifier: Apache-2.0
"""Routes of the rows: pure integers, no process group.

The oracle knows nothing of cells, copies or turns. It places every row by the rule in words (who
encodes it, which coordinates own its token), moves labelled rows between the planned ranks, and
counts what a rank must receive because it needs the row and does not hold it.
"""

from __future__ import annotations

import doctest
import itertools
import sys
import tracemalloc
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest

from megatron.core.hyper_comm_grid import GridShape
from megatron.core.models.mimo.comm.plan import group_rows, routed_layout, routes, token_runs
from megatron.core.models.mimo.comm.plan.routed_layout import RouteLayout
from megatron.core.models.mimo.comm.plan.routes import GroupRoutes, RoutePlan, plan_routes
from megatron.core.models.mimo.comm.plan.token_runs import TokenRuns, rows_of_items, split_items
from megatron.core.models.mimo.partition import position_owners as owners_module
from megatron.core.models.mimo.partition.position_owners import position_owners
from megatron.core.models.mimo.partition.sequence_order import (
    SequenceShardError,
    dense_positions,
    packed_positions,
)

pytestmark = pytest.mark.once

POWERS = (1, 2, 4, 8)
PAIRS = [
    ((tp, 8 // tp), (dest_tp, cp, 8 // (dest_tp * cp)))
    for tp in POWERS
    for dest_tp in POWERS
    for cp in POWERS
    if 8 % (dest_tp * cp) == 0
]
ORDERS = [
    (("tp", "dp"), ("tp", "cp", "dp")),
    (("dp", "tp"), ("cp", "tp", "pp", "dp")),
]


def grids(
    src: tuple[int, int],
    dest: tuple[int, int, int],
    orders: tuple[tuple[str, ...], tuple[str, ...]] = ORDERS[0],
    offset: int = 0,
) -> tuple[GridShape, GridShape]:
    """(tp, dp) and (tp, cp, dp) as boxes whose dims come in the given orders."""
    sizes = {"tp": src[0], "dp": src[1]}, dict(zip(("tp", "cp", "dp"), dest, strict=True))
    return tuple(
        GridShape(tuple(size.get(name, 1) for name in order), order, offset)
        for size, order in zip(sizes, orders, strict=True)
    )


def random_tokens(
    generator: np.random.Generator, batch: int, seq_len: int, share: float
) -> TokenRuns:
    return TokenRuns.from_mask(generator.random((batch, seq_len)) < share)


@dataclass
class World:
    """Both grids, and where every row is, by the rule in words and rank by rank."""

    src: GridShape
    dest: GridShape
    sequence_parallel: bool
    tokens: Sequence[TokenRuns]
    held: list[np.ndarray]

    def owned_places(self, rank: int, tokens: TokenRuns) -> dict[int, int]:
        """Flattened place in a replica's batch -> flattened place in the rank's local batch."""
        at = self.dest.coords(rank)
        if at.get("pp", 0) > 0:
            return {}  # the first pipeline stage builds the sequence
        cp, tp = self.dest.dim_size("cp"), self.dest.dim_size("tp")
        if tokens.cu_seqlens is not None:
            mine = packed_positions(tokens.cu_seqlens, at.get("cp", 0), cp)
        else:
            mine = dense_positions(tokens.seq_len, at.get("cp", 0), cp)
        if self.sequence_parallel:
            share = len(mine) // tp
            mine = mine[at["tp"] * share : (at["tp"] + 1) * share]
        return {
            b * tokens.seq_len + s: local * tokens.batch + b
            for local, s in enumerate(mine)
            for b in range(tokens.batch)
        }

    def needed(self, rank: int) -> dict[int, int]:
        """Row -> place, for the rows that a rank needs. Rows are numbered over all replicas."""
        mine = self.dest.coords(rank)["dp"]
        first = sum(each.count for each in self.tokens[:mine])
        places = self.owned_places(rank, self.tokens[mine])
        positions = self.tokens[mine].positions().tolist()
        return {first + k: places[p] for k, p in enumerate(positions) if p in places}

    def held_by(self, rank: int) -> list[int]:
        """Rows that a rank's encoder brings, in order."""
        at = self.src.coords(rank)
        return self.held[at["dp"] * self.src.dim_size("cp") + at.get("cp", 0)].tolist()


def as_runs(rows: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [token_runs.runs_of(each) for each in rows]


def plan_all(world: World, **layout_options) -> dict[int, RoutePlan]:
    """Every rank's plan; rows of a group are numbered from its first language replica."""
    layout = RouteLayout.from_grids(
        world.src,
        world.dest,
        "images",
        "language",
        sequence_parallel=world.sequence_parallel,
        **layout_options,
    )
    before = np.cumsum([0, *(each.count for each in world.tokens)])
    plans = {}
    for group in layout.groups():
        tokens = [world.tokens[dp] for dp in group.dest_dps]
        # Blocks of whole replicas, so a group's rows are consecutive.
        shift = before[group.dest_dps[0]]
        cp = layout.src_cp_size
        holders = [dp * cp + part for dp in group.src_dps for part in range(cp)]
        held = as_runs([world.held[holder] - shift for holder in holders])
        made = GroupRoutes(group, tokens, held)
        plans |= {int(rank): made.plan(int(rank)) for rank in group.ranks}
    assert sorted(plans) == list(layout.ranks)
    return plans


def move(plans: dict[int, RoutePlan], leg: str, brought: dict[int, np.ndarray]) -> dict:
    """What every rank receives when all send as planned: rank -> list of labels, by sender."""
    chunks = {}
    for rank, plan in plans.items():
        part = getattr(plan, leg)
        sent = np.split(brought[rank][part.send_index], np.cumsum(part.send_splits)[:-1])
        chunks |= {(rank, int(to)): chunk for to, chunk in zip(plan.ranks, sent, strict=True)}
    received = {}
    for rank, plan in plans.items():
        parts = [chunks[int(sender), rank] for sender in plan.ranks]
        assert [part.shape[0] for part in parts] == getattr(plan, leg).recv_splits.tolist()
        received[rank] = np.concatenate(parts)
    return received


def check(world: World, plans: dict[int, RoutePlan]) -> None:
    """Rows reach their places, gradients their holders, and nothing travels without need."""
    held = {rank: np.array(world.held_by(rank), dtype=np.int64) for rank in plans}
    assert all(plan.held == held[rank].size for rank, plan in plans.items())
    arrived = move(plans, "forward", held)
    own = {
        rank: np.concatenate([held[rank][plan.local_index], arrived[rank]])
        for rank, plan in plans.items()
    }
    for rank, plan in plans.items():
        needed = world.needed(rank)
        assert dict(zip(own[rank].tolist(), plan.place.tolist(), strict=True)) == needed
        assert plan.forward.received == len(set(needed) - set(held[rank].tolist()))
        assert plan.local_length * plan.tokens.batch > max(needed.values(), default=-1)
    arrived = move(plans, "backward", own)
    for rank, plan in plans.items():
        gradient = np.full(held[rank].size, -1)
        gradient[plan.local_index] = own[rank][: plan.local_index.size]
        assert (gradient[plan.backward_index] == -1).all()
        gradient[plan.backward_index] = arrived[rank]
        assert np.array_equal(gradient, held[rank])
        assert plan.backward.received == len(set(held[rank].tolist()) - set(world.needed(rank)))
    for plan in plans.values():
        members = [plans[int(rank)] for rank in plan.ranks]
        assert plan.forward.moves == any(each.forward.sent for each in members)
        assert plan.backward.moves == any(each.backward.sent for each in members)
        assert {each.digest() for each in members} == {plan.digest()}


@pytest.mark.parametrize("module", [routed_layout, routes, token_runs, owners_module])
def test_docstring_examples(module):
    outcome = doctest.testmod(module)
    assert outcome.attempted >= 2
    assert outcome.failed == 0


@pytest.mark.parametrize(("cp", "tp"), list(itertools.product([1, 2, 3, 4], [1, 2])))
def test_owners_are_the_inverse_of_the_positions(cp, tp):
    seq_len = 2 * cp * tp * 3
    found = position_owners(np.arange(seq_len), seq_len, cp, tp)
    for c, t in itertools.product(range(cp), range(tp)):
        mine = dense_positions(seq_len, c, cp, t, tp)
        assert [part[mine].tolist() for part in found] == [
            [c] * len(mine),
            [t] * len(mine),
            list(range(len(mine))),
        ]
    lengths = [0, 2 * cp, 2 * cp, 8 * cp, 12 * cp]
    found = position_owners(np.arange(12 * cp), 12 * cp, cp, 1, lengths)
    for c in range(cp):
        mine = packed_positions(lengths, c, cp)
        assert found[0][mine].tolist() == [c] * len(mine)
        assert found[2][mine].tolist() == list(range(len(mine)))


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tp_copies", "sp"])
@pytest.mark.parametrize("orders", ORDERS, ids=["dp_slowest", "dp_fastest"])
def test_every_pair_of_8_rank_grids_against_the_oracle(orders, sequence_parallel):
    """Uneven tokens per sample and per replica, rows split inside samples and images."""
    generator = np.random.default_rng(5)
    for src_sizes, dest_sizes in PAIRS:
        src, dest = grids(src_sizes, dest_sizes, orders, offset=3)
        seq_len = 2 * dest_sizes[0] * dest_sizes[1]
        shares = generator.choice([0.0, 0.2, 0.9], dest_sizes[2])
        tokens = [random_tokens(generator, 3, seq_len, share) for share in shares]
        rows = np.arange(sum(each.count for each in tokens))
        world = World(src, dest, sequence_parallel, tokens, [])
        # Any cut inside an exchange group: here one group, so any cut at all.
        cuts = np.sort(generator.integers(0, rows.size + 1, src_sizes[1] - 1))
        world.held = np.split(rows, cuts)
        check(world, plan_all(world, one_group=True))


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tp_copies", "sp"])
@pytest.mark.parametrize(("src", "dest"), PAIRS)
def test_bytes_of_uniform_tokens_are_the_lower_bound(src, dest, sequence_parallel):
    """Received rows per rank: "only the rows needed", exactly, for whole samples per replica.

    With sequence parallelism the sequence has c = cp * tp owners.
    """
    tp, cp, dest_dp = dest
    seq_len, samples = 2 * cp * tp, max(src[1] // dest_dp, 1)
    tokens = [TokenRuns.from_mask(np.ones((samples, seq_len), dtype=bool))] * dest_dp
    rows = np.arange(sum(each.count for each in tokens))
    world = World(*grids(src, dest), sequence_parallel, tokens, np.split(rows, src[1]))
    plans = plan_all(world)
    check(world, plans)
    n, c = Fraction(samples * seq_len), cp * tp if sequence_parallel else cp
    s = Fraction(max(src[1], dest_dp), min(src[1], dest_dp))
    if src[1] > dest_dp:
        expected = (1 - 1 / s) * n / c, (1 - Fraction(1, c)) * n / s
    else:
        expected = 0, (s - Fraction(1, c)) * n
    for plan in plans.values():
        assert (plan.forward.received, plan.backward.received) == expected
        # The copies of a replica share the sending, so each sends what it receives, give or take
        # the row that does not divide.
        assert abs(plan.forward.sent - expected[0]) <= 1
        assert plan.ranks.size == 8 // np.gcd(src[1], dest_dp)


RATIOS = [
    pytest.param((2, 3), (1, 3, 2), id="3_to_2"),
    pytest.param((3, 2), (1, 2, 3), id="2_to_3"),
    pytest.param((2, 6), (1, 3, 4), id="6_to_4"),
    pytest.param((3, 4), (1, 2, 6), id="4_to_6"),
    pytest.param((1, 8), (2, 4, 1), id="8_to_1_one_sample"),
]


@pytest.mark.parametrize(("src", "dest"), RATIOS)
def test_any_dp_ratio_by_interval_overlap(src, dest):
    """Images are cut where the replicas' shares end, also inside a sample and inside an image."""
    generator = np.random.default_rng(8)
    tp, cp, dest_dp = dest
    groups = int(np.gcd(src[1], dest_dp))
    seq_len = 2 * cp * tp * 5
    tokens = [random_tokens(generator, 1, seq_len, 0.6) for _ in range(dest_dp)]
    world = World(*grids(src, dest), False, tokens, [])
    for block in range(groups):
        replicas = range(block * dest_dp // groups, (block + 1) * dest_dp // groups)
        first = sum(each.count for each in tokens[: replicas.start])
        count = sum(tokens[dp].count for dp in replicas)
        parts = split_items(count, src[1] // groups)
        world.held += [first + np.array(part) for part in parts]
    plans = plan_all(world)
    assert {plan.ranks.size for plan in plans.values()} == {src[0] * src[1] // groups}
    check(world, plans)


def test_items_assigned_by_cost_go_back_to_their_places():
    """Images of several sizes in any order on the encoders; each replica's rows stay together."""
    generator = np.random.default_rng(9)
    tokens = [random_tokens(generator, 2, 24, 0.7) for _ in range(2)]
    total = sum(each.count for each in tokens)
    rows_per_item = [1, 5, 2, total - 8]
    runs = rows_of_items(rows_per_item, [[3], [], [2, 0], [1]])
    world = World(*grids((2, 4), (2, 2, 2)), False, tokens, [token_runs.expand(r) for r in runs])
    check(world, plan_all(world, one_group=True))


def test_packed_sequences():
    generator = np.random.default_rng(3)
    lengths = [0, 8, 8, 20, 32]
    tokens = [TokenRuns.from_mask(generator.random((1, 32)) < 0.5, lengths) for _ in range(2)]
    rows = np.arange(sum(each.count for each in tokens))
    for sequence_parallel in (False, True):
        world = World(
            *grids((2, 4), (2, 2, 2)), sequence_parallel, tokens, np.split(rows, [3, 5, 9])
        )
        check(world, plan_all(world, one_group=True))


@pytest.mark.parametrize("empty", ["nothing_at_all", "one_group", "one_source", "one_language"])
def test_empty_parts(empty):
    mask = np.ones((1, 8), dtype=bool)
    none = np.zeros((1, 8), dtype=bool)
    masks = {"nothing_at_all": (none, none), "one_group": (none, mask)}.get(empty, (mask, mask))
    if empty == "one_language":
        masks = (mask, none)
    tokens = [TokenRuns.from_mask(each) for each in masks]
    rows = np.arange(sum(each.count for each in tokens))
    middle = tokens[0].count
    cuts = {"one_source": [0, 8, 12]}.get(empty, [middle // 2, middle, (middle + rows.size) // 2])
    world = World(*grids((2, 4), (2, 2, 2)), False, tokens, np.split(rows, cuts))
    plans = plan_all(world)
    check(world, plans)
    expected = {"nothing_at_all": (0, 0), "one_group": (0, 8), "one_language": (8, 0)}
    assert (plans[0].group_rows, plans[4].group_rows) == expected.get(empty, (8, 8))
    moves = [(plans[rank].forward.moves, plans[rank].backward.moves) for rank in (0, 4)]
    assert moves == [(bool(plans[rank].group_rows),) * 2 for rank in (0, 4)]


def test_copies_share_the_sending():
    """64 rows to each of 4 owners from 4 copies: 16 of them by each copy, remainders spread."""
    for count in (64, 62, 3):
        tokens = [TokenRuns.from_positions(np.arange(count), 1, 128)]
        layout = RouteLayout.from_grids(*grids((4, 2), (2, 4, 1)))
        routes_of_group = GroupRoutes(layout.group_of(0), tokens, [count, 0])
        sent = [routes_of_group.plan(rank).forward.sent for rank in range(4)]
        total = sum(routes_of_group.plan(rank).forward.received for rank in range(8))
        assert sum(sent) == total
        assert max(sent) - min(sent) <= 2


def test_a_rank_looks_at_single_rows_of_its_own_replicas_only(monkeypatch):
    """Stages outermost in the grid make one group of all ranks, here of eight language replicas."""
    tokens = [TokenRuns.from_positions(np.arange(32), 1, 64)] * 8
    dest = GridShape((1, 2, 8, 2), ("tp", "cp", "dp", "pp"))
    layout = RouteLayout.from_grids(GridShape((2, 16), ("tp", "dp")), dest)
    assert layout.group_count == 1
    looked_at: list[int] = []

    def owners(positions, *arguments):
        looked_at.append(positions.size)
        return position_owners(positions, *arguments)

    monkeypatch.setattr(group_rows, "position_owners", owners)
    seen = {}
    for rank in layout.ranks:
        looked_at.clear()
        plan_routes(layout, rank, tokens, [16] * 16)
        seen[rank] = sum(looked_at)
    # Of 256: those of its own replica (32) to find what it owns; what it owns and holds; one
    # stretch to see whether anything moves. The other stage owns nothing.
    assert max(seen.values()) <= 96
    assert max(seen[rank] for rank in range(16, 32)) <= 32


@pytest.mark.parametrize("leg", ["forward", "backward"])
def test_every_rank_is_served_by_all_copies_alike(leg):
    """What one rank receives of one replica's rows comes from each of its TP ranks in turn.

    Seen from the receiver, since with as many receivers as copies the senders are even anyway.
    """
    served = 0
    for count in (64, 62, 5):
        tokens = [TokenRuns.from_positions(np.arange(count), 1, 128)]
        sides = {"forward": ((4, 2), (2, 4, 1)), "backward": ((1, 8), (4, 2, 1))}[leg]
        layout = RouteLayout.from_grids(*grids(*sides))
        held = [count] + [0] * (sides[0][1] - 1)
        made = GroupRoutes(layout.group_of(0), tokens, held)
        for rank in range(8):
            received = getattr(made.plan(rank), leg).recv_splits
            for first in (0, 4):  # four copies each: of an encoder replica, of an owner
                part = received[first : first + 4]
                assert part.max() - part.min() <= 1
                served += part.sum() > 4
    assert served


def build_at(world_size: int) -> tuple[int, int, RoutePlan]:
    """(peak bytes, Python calls, plan) of layout, routes and digest for one rank."""
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event == "call"

    dest_dp = world_size // 32
    boxes = grids((2, world_size // 2), (4, 8, dest_dp))
    tokens = [TokenRuns.from_positions(np.arange(64), 1, 128)]
    tracemalloc.start()
    sys.setprofile(count)
    layout = RouteLayout.from_grids(*boxes)
    plan = plan_routes(layout, world_size - 1, tokens, [4] * 16)
    sys.setprofile(None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak, calls, plan


def test_planning_grows_linearly_to_16384_ranks():
    """As many Python calls whatever the world, on arrays that grow with it and no faster."""
    (_, few, small), (middle, some, _), (large, many, plan) = map(build_at, (1024, 4096, 16384))
    # One union-find look-up per exchange group is the only loop.
    assert many - some == 4 * (some - few)
    assert many <= some * 4
    assert 3 <= large / middle <= 4.2
    # 14 int64 arrays over the ranks and their temporaries.
    assert large < 16384 * 8 * 40
    assert plan.ranks.size == small.ranks.size == 32
    assert plan.forward.received == small.forward.received


def test_all_ranks_of_a_large_world_are_in_one_group_each():
    layout = RouteLayout.from_grids(*grids((1, 16384), (8, 16, 128)))
    seen = np.concatenate([group.ranks for group in layout.groups()])
    assert layout.group_count == 128
    assert np.array_equal(seen, np.arange(16384))
    one = layout.group_of(16383)
    assert one.src_dps.tolist() == list(range(16256, 16384))
    assert one.dest_dps.tolist() == [127]


TOKENS = TokenRuns.from_mask(np.ones((1, 8), dtype=bool))


@pytest.mark.parametrize(
    ("tokens", "held", "message"),
    [
        ([TOKENS], [4, 3], r"images tokens \(8\) .* \(7\).*ranks that starts at rank 4: tokens per"
         r" language replica \[8\], rows per images replica \[4, 3\]"),
        ([TOKENS] * 2, [4, 4], "token places of language of its 1 replicas, got 2"),
        ([TOKENS], [8], "held rows of images of its 2 replicas, got 1"),
        ([TOKENS], [[(0, 4)], [(0, 4)]], "Row 4 of 8 is held by no .* another one is held twice"),
        ([TOKENS], [[(0, 4)], [(6, 4)]], "replica 3 holds rows 6 to 9, but .* are 0 to 7"),
        ([TOKENS], [[(0, 4)], [(5, 4)]], "replica 3 holds rows 5 to 8, but .* are 0 to 7"),
    ],
)  # fmt: skip
def test_what_does_not_match_is_refused(tokens, held, message):
    layout = RouteLayout.from_grids(*grids((2, 4), (2, 2, 2)), "images", "language")
    with pytest.raises(ValueError, match=message):
        plan_routes(layout, 5, tokens, held)


def test_sequences_that_cannot_be_cut_are_refused():
    layout = RouteLayout.from_grids(*grids((2, 4), (2, 2, 2)))
    with pytest.raises(SequenceShardError, match="divisible by 4"):
        plan_routes(layout, 0, [TokenRuns.from_positions(np.arange(2), 1, 6)], [1, 1])
    packed = TokenRuns.from_positions(np.arange(2), 1, 8, [0, 4])
    with pytest.raises(SequenceShardError, match="end at 4"):
        plan_routes(layout, 0, [packed], [1, 1])
    # Without CP any lengths will do, but TP cuts all of them together.
    boxes = grids((4, 2), (2, 1, 4))
    layout = RouteLayout.from_grids(*boxes, sequence_parallel=True, one_group=True)
    odd = TokenRuns.from_positions(np.arange(2), 1, 7, [0, 3, 7])
    with pytest.raises(SequenceShardError, match="divisible by 2 .* got 7"):
        plan_routes(layout, 0, [odd] * 4, [4, 4])


def test_ranks_outside_are_refused():
    layout = RouteLayout.from_grids(*grids((2, 4), (2, 2, 2), offset=8))
    with pytest.raises(ValueError, match="Rank 3 is not on the bridge .* 8 to 15"):
        layout.group_of(3)
    with pytest.raises(ValueError, match="Rank 8 is not in the exchange group 12-15"):
        layout.group_of(12).index(8)
    with pytest.raises(ValueError, match="Rank 12 is not in the exchange group 8-11"):
        layout.group_of(8).index(12)


def test_the_digest_names_what_differs():
    boxes = grids((2, 4), (2, 2, 2))
    layout = RouteLayout.from_grids(*boxes)
    base = plan_routes(layout, 0, [TOKENS], [4, 4]).digest()
    assert plan_routes(layout, 3, [TOKENS], [4, 4]).digest() == base
    scattered = RouteLayout.from_grids(*boxes, sequence_parallel=True)
    shifted = TokenRuns.from_positions(np.arange(8), 1, 16)
    packed = TokenRuns.from_mask(np.ones((1, 8), dtype=bool), [0, 8])
    others = {
        "layout": [plan_routes(scattered, 0, [TOKENS], [4, 4])],
        "tokens": [plan_routes(layout, 0, [each], [4, 4]) for each in (shifted, packed)],
        "held": [
            plan_routes(layout, 0, [TOKENS], [5, 3]),
            plan_routes(layout, 0, [TOKENS], [[(4, 4)], [(0, 4)]]),
            plan_routes(layout, 0, [TOKENS], [8, 0]),
            plan_routes(layout, 0, [TOKENS], [0, 8]),
        ],
    }
    for field, plans in others.items():
        for plan in plans:
            differing = {f for f in vars(base) if getattr(base, f) != getattr(plan.digest(), f)}
            assert differing == {field}
    # Nor are plans alike that have the same runs, cut over the replicas at another place.
    assert len({plan.digest().held for plan in others["held"]}) == len(others["held"])
    # Each thing that makes another layout, of the same rows and tokens.
    staged = GridShape((4, 1), ("tp", "dp")), GridShape((1, 1, 4), ("tp", "dp", "pp"))
    layouts = [
        *(RouteLayout.from_grids(*staged, later_stages=each) for each in ((), (1,), (2,), (1, 2))),
        RouteLayout.from_grids(*grids((4, 1), (2, 2, 1))),
        RouteLayout.from_grids(*grids((4, 1), (2, 2, 1)), sequence_parallel=True),
        RouteLayout.from_grids(*grids((4, 1), (2, 2, 1), offset=4)),
        RouteLayout.from_grids(*grids((2, 1), (2, 1, 1))),
    ]
    told = [plan_routes(at, at.rank_offset, [TOKENS], [8]).digest().layout for at in layouts]
    assert len(set(told)) == len(layouts)
    # The same places and as many sequences, but CP cuts them at other places.
    two_packings = {
        plan_routes(layout, 0, [TokenRuns.from_positions(np.arange(8), 1, 16, cu)], [4, 4])
        .digest()
        .tokens
        for cu in ([0, 8, 16], [0, 4, 16])
    }
    assert len(two_packings) == 2
