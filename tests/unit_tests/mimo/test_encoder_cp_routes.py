# SPDX-License-Identifier: Apache-2.0
"""Routes from encoders that cut their items over CP: pure integers, no process group.

The oracle is that of ``test_routes``: every row to every owner, every gradient to exactly its
holder. Who holds what is said here by the rule in words, row by row.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.core.hyper_comm_grid import GridShape
from megatron.core.models.mimo.comm.plan.batch_routes import plan_even_batch
from megatron.core.models.mimo.comm.plan.gather_layout import BridgeLayout, check_grids
from megatron.core.models.mimo.comm.plan.routed_layout import RouteLayout
from megatron.core.models.mimo.comm.plan.routes import GroupRoutes, plan_routes
from megatron.core.models.mimo.comm.plan.token_runs import TokenRuns, expand, rows_of_parts
from tests.unit_tests.mimo.test_routes import World, check, plan_all, random_tokens

pytestmark = pytest.mark.once

POWERS = (1, 2, 4, 8)
LAYOUTS = [(tp, cp, 8 // (tp * cp)) for tp in POWERS for cp in POWERS if tp * cp <= 8]
DIMS = ("tp", "cp", "dp")


def parts_by_rule(items: list[list[int]], cp: int) -> list[np.ndarray]:
    """Rows of every holder: row ``k`` of an item of ``n`` is in the part whose bounds it is in."""
    held: list[list[int]] = []
    first = 0
    for replica in items:
        own: list[list[int]] = [[] for _ in range(cp)]
        for n in replica:
            for k in range(n):
                (part,) = (c for c in range(cp) if n * c // cp <= k < n * (c + 1) // cp)
                own[part].append(first + k)
            first += n
        held += own
    return [np.array(rows, dtype=np.int64) for rows in held]


def random_items(generator: np.random.Generator, rows: int, replicas: int) -> list[list[int]]:
    """Items of 1 to 7 rows, shared out at random; replicas without any among them."""
    items: list[int] = []
    while rows:
        items.append(min(int(generator.integers(1, 8)), rows))
        rows -= items[-1]
    cuts = np.sort(generator.integers(0, len(items) + 1, replicas - 1)).tolist()
    return [items[start:stop] for start, stop in itertools.pairwise([0, *cuts, len(items)])]


def world_of(
    src: tuple[int, int, int], dest: tuple[int, int, int], seed: int, sequence_parallel: bool
) -> World:
    generator = np.random.default_rng(seed)
    seq_len = 2 * dest[0] * dest[1] * 2
    shares = generator.choice([0.0, 0.3, 0.9], dest[2])
    tokens = [random_tokens(generator, 2, seq_len, share) for share in shares]
    rows = sum(each.count for each in tokens)
    held = parts_by_rule(random_items(generator, rows, src[2]), src[1])
    grids = GridShape(src, DIMS, 3), GridShape(dest, DIMS, 3)
    return World(*grids, sequence_parallel, tokens, held)


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tp_copies", "sp"])
@pytest.mark.parametrize("src", LAYOUTS, ids=str)
def test_every_pair_of_8_rank_layouts(src, sequence_parallel):
    """Any encoder (TP, CP, DP) beside any language model (TP, CP, DP), items of any size."""
    for seed, dest in enumerate(LAYOUTS):
        world = world_of(src, dest, seed, sequence_parallel)
        check(world, plan_all(world, one_group=True))


@given(
    st.sampled_from([(1, 3, 4), (2, 2, 3), (1, 2, 6), (3, 4, 1), (1, 12, 1), (2, 6, 1)]),
    st.sampled_from([(1, 3, 4), (3, 2, 2), (1, 1, 12), (2, 3, 2), (1, 12, 1), (12, 1, 1)]),
    st.integers(0, 999),
    st.booleans(),
)
def test_layouts_that_are_no_powers_of_two(src, dest, seed, sequence_parallel):
    world = world_of(src, dest, seed, sequence_parallel)
    check(world, plan_all(world, one_group=True))


def test_the_oracle_notices_parts_that_are_taken_for_one_anothers():
    tokens = [TokenRuns.from_mask(np.ones((2, 8), dtype=bool))] * 2
    # Two rows of every item, so that both parts have as many.
    held = parts_by_rule([[2] * 4] * 4, 2)
    world = World(GridShape((1, 2, 4), DIMS), GridShape((2, 2, 2), DIMS), False, tokens, held)
    check(world, plan_all(world, one_group=True))
    swapped = [world.held[holder ^ 1] for holder in range(8)]
    with pytest.raises(AssertionError):
        check(world, plan_all(replace(world, held=swapped), one_group=True))


@given(
    st.lists(st.lists(st.integers(0, 20), max_size=4), min_size=1, max_size=4), st.integers(1, 9)
)
def test_rows_of_parts_are_those_of_the_rule(items, cp):
    found = [expand(runs).tolist() for runs in rows_of_parts(items, cp)]
    assert found == [rows.tolist() for rows in parts_by_rule(items, cp)]


def test_exchange_groups_hold_whole_replicas():
    """CP ranks of a replica are in its exchange group, so groups stay as small as DP says."""
    src, dest = GridShape((1, 2, 4), DIMS), GridShape((2, 2, 2), DIMS)
    layout = RouteLayout.from_grids(src, dest)
    assert (layout.group_count, layout.src_cp_size) == (2, 2)
    group = layout.group_of(5)
    assert group.ranks.tolist() == [4, 5, 6, 7]
    assert (group.holders, group.src_dps.tolist()) == (4, [2, 3])
    assert group.src_of.tolist() == [0, 1, 2, 3]
    assert group.src_ranks.tolist() == [[0], [1], [2], [3]]


def test_ranks_that_see_another_encoder_cp_plan_from_another_layout():
    """Four holders are four replicas to one rank and two of CP 2 to another: the digest tells."""
    dest, digests = GridShape((1, 1, 4), DIMS), []
    runs = [np.array([[row, 1]]) for row in range(4)]
    tokens = [TokenRuns.from_positions(np.array([0]), 1, 4)] * 4
    for src in ((1, 1, 4), (1, 2, 2)):
        layout = RouteLayout.from_grids(GridShape(src, DIMS), dest, one_group=True)
        digests.append(GroupRoutes(layout.group_of(0), tokens, runs).digest)
    assert digests[0].layout != digests[1].layout
    assert digests[0].held == digests[1].held


class TestRefusals:
    src, dest = GridShape((1, 2, 2), DIMS), GridShape((1, 4, 1), DIMS)
    layout = RouteLayout.from_grids(src, dest, "images", "language")
    tokens = [TokenRuns.from_positions(np.arange(5), 1, 8)]

    def test_numbers_of_rows(self):
        with pytest.raises(ValueError, match=r"\[2, 2\], but the encoder's 2 CP ranks hold a part "
                           "of each item; give the runs of each, as rows_of_parts"):  # fmt: skip
            plan_routes(self.layout, 0, self.tokens, [2, 2])
        with pytest.raises(ValueError, match="rows_of_parts"):
            plan_even_batch(self.layout, 0, np.ones((2, 8), dtype=bool))

    def test_an_entry_per_holder(self):
        with pytest.raises(ValueError, match=r"of its 4 holders, got 1; .* within it in CP order"):
            plan_routes(self.layout, 0, self.tokens, rows_of_parts([[5]], 1))

    def test_rows_that_are_not_there(self):
        runs = [*rows_of_parts([[3]], 2), np.array([[3, 1]]), np.array([[5, 1]])]
        with pytest.raises(ValueError, match="replica 1, CP rank 1, holds rows 5 to 5, but"):
            plan_routes(self.layout, 0, self.tokens, runs)

    def test_the_gather_bridge(self):
        with pytest.raises(ValueError, match=r"src CP must be 1 .* got 2 .*use bridge='routed'"):
            BridgeLayout.from_grids(self.src, self.dest)

    def test_encoder_stages(self):
        pipelined = GridShape((1, 2, 2), ("tp", "pp", "dp"))
        with pytest.raises(ValueError, match=r"src PP must be 1.*side; give those ranks .* TP\.$"):
            check_grids(pipelined, self.dest, src_dims=("tp", "cp", "dp"))
