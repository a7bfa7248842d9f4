# SPDX-License-Identifier: Apache-2.0
"""``plan_even_batch``: integers only, against plans of the same rows written out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from megatron.core.hyper_comm_grid import GridShape
from megatron.core.models.mimo.comm.plan.batch_routes import plan_even_batch
from megatron.core.models.mimo.comm.plan.routed_layout import RouteLayout
from megatron.core.models.mimo.comm.plan.routes import RowCountError, plan_routes
from megatron.core.models.mimo.comm.plan.token_runs import TokenRuns

pytestmark = pytest.mark.once

SRC = GridShape((2, 4), ("tp", "dp"))
DEST = GridShape((2, 2, 2), ("tp", "cp", "dp"))
# Samples with other numbers of tokens, one with none.
COUNTS = (3, 0, 5, 1, 8, 2, 0, 4)


def batch(counts: tuple[int, ...] = COUNTS) -> np.ndarray:
    return np.array([[column < count for column in range(8)] for count in counts])


@pytest.mark.parametrize("rank", range(8))
def test_tokens_and_rows_of_each_replica(rank: int) -> None:
    layout = RouteLayout.from_grids(SRC, DEST)
    plan = plan_even_batch(layout, rank, batch())
    half = rank // 4
    tokens = TokenRuns.from_mask(batch()[4 * half : 4 * half + 4])
    held = [[3, 6], [10, 4]][half]
    by_hand = plan_routes(layout, rank, [tokens], held)
    assert plan.held == held[rank // 2 % 2]
    assert plan.digest() == by_hand.digest()
    assert plan.place.tolist() == by_hand.place.tolist()


def test_packed_replicas_own_the_same_rows_at_packed_places() -> None:
    """Samples of 8 tokens over CP 2, one after another: local place = 4 * sample + place in it."""
    layout = RouteLayout.from_grids(SRC, DEST)
    for rank in range(8):
        dense = plan_even_batch(layout, rank, batch())
        packed = plan_even_batch(layout, rank, batch(), packed=True)
        assert packed.tokens.batch == 1
        assert packed.tokens.cu_seqlens == (0, 8, 16, 24, 32)
        place, sample = np.divmod(dense.place, 4)
        assert packed.place.tolist() == (4 * sample + place).tolist()


def test_packed_samples_that_are_cut_to_lengths_of_their_own() -> None:
    layout = RouteLayout.from_grids(SRC, DEST)
    lengths = [4, 0, 8, 4, 8, 4, 4, 8]
    for rank in range(8):
        first = 4 * (rank // 4)
        mine = lengths[first : first + 4]
        packed = plan_even_batch(layout, rank, batch(), packed=lengths)
        ends = np.cumsum([0, *mine])
        assert packed.tokens.cu_seqlens == tuple(ends.tolist())
        assert packed.tokens.seq_len == sum(mine)
        places = [
            start + column
            for start, count in zip(ends, COUNTS[first : first + 4], strict=False)
            for column in range(count)
        ]
        assert packed.tokens.positions().tolist() == places


def test_shares_that_do_not_nest_are_one_group() -> None:
    """DP 3 beside DP 2: six samples, two per encoder replica and three per language replica."""
    grids = GridShape((2, 3), ("tp", "dp")), GridShape((1, 3, 2), ("tp", "cp", "dp"))
    layout = RouteLayout.from_grids(*grids)
    mask = np.ones((6, 12), dtype=bool)
    plans = [plan_even_batch(layout, rank, mask) for rank in range(6)]
    assert [plan.held for plan in plans] == [24] * 6
    assert [plan.own for plan in plans] == [12] * 6


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([8] * 7, r"a length of 0 to 8 for each of the 8 samples, got \[8, 8"),
        ([8] * 7 + [9], "a length of 0 to 8"),
        ([8, 8, 4, 8, 8, 8, 8, 8], "packed cuts sample 2 to 4 tokens, but later ones"),
    ],
)
def test_lengths_that_do_not_fit_the_samples(lengths: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_even_batch(RouteLayout.from_grids(SRC, DEST), 0, batch(), packed=lengths)


def test_batches_that_cannot_be_cut() -> None:
    layout = RouteLayout.from_grids(SRC, DEST, "vision", "language")
    message = "6 samples cannot be divided evenly over the 4 DP replicas of vision; use a multiple"
    with pytest.raises(ValueError, match=message) as refusal:
        plan_even_batch(layout, 0, batch((1,) * 6))
    assert not isinstance(refusal.value, RowCountError)
    with pytest.raises(ValueError, match="Rank 8 is not on the bridge vision -> language"):
        plan_even_batch(layout, 8, batch())
