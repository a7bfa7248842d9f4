# SPDX-License-Identifier: Apache-2.0
"""Byte formulas, lower bounds and the pictures' moves, against one another. Pure integers."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from benchmarks.cases import EQUAL_2, FAN_IN_4_4, FAN_OUT_2_2, PAIRS, Pair, TokenBatch
from benchmarks.formulas import Rows, gather_rows, lower_bound, routed_rows
from benchmarks.plots import EXAMPLE, STAGES, example_batch, gather_halves, routed_halves
from megatron.core.models.mimo.comm.plan.routes import plan_routes

ROWS = 1024


def test_fan_in_by_4_with_cp_4_sends_4_times_less_forward_and_8_times_less_backward():
    gather, routed = gather_rows(FAN_IN_4_4), routed_rows(FAN_IN_4_4)
    assert gather.forward / routed.forward == 4
    assert gather.backward / routed.backward == 8


@pytest.mark.parametrize(
    ("pair", "gather", "routed"),
    [
        (EQUAL_2, Rows(Fraction(0), Fraction(1)), Rows(Fraction(0), Fraction(1, 2))),
        (FAN_OUT_2_2, Rows(Fraction(0), Fraction(2)), Rows(Fraction(0), Fraction(3, 2))),
    ],
    ids=["equal", "fan_out"],
)
def test_formulas_of_the_other_directions(pair, gather, routed):
    assert (gather_rows(pair), routed_rows(pair)) == (gather, routed)


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_uniform_tokens_need_what_the_formula_says_on_every_rank(pair):
    batch = TokenBatch.uniform(pair, ROWS)
    for rank in range(pair.world_size):
        assert lower_bound(pair, batch, rank) == routed_rows(pair) * ROWS


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_routes_receive_the_lower_bound_and_no_more(pair):
    batch = TokenBatch.uneven(pair, 128, seed=3)
    assert len(set(batch.held)) > 1 or pair.vision.dp == 1
    sent = received = 0
    for rank in range(pair.world_size):
        plan = plan_routes(pair.route_layout(), rank, *batch.of_group(pair, rank))
        bound = lower_bound(pair, batch, rank)
        assert (plan.forward.received, plan.backward.received) == (bound.forward, bound.backward)
        sent += plan.forward.sent + plan.backward.sent
        received += bound.forward + bound.backward
    assert sent == received


def test_the_pictures_move_what_the_formulas_say():
    batch = example_batch()
    rows, ranks = batch.rows, EXAMPLE.world_size
    for halves, formula in (
        (gather_halves(EXAMPLE, batch), gather_rows(EXAMPLE)),
        (routed_halves(EXAMPLE, batch), routed_rows(EXAMPLE)),
    ):
        moved = [sum(count for _, _, count in half.moves) for half in halves]
        assert moved == [formula.forward * rows * ranks, formula.backward * rows * ranks]
        for half in halves:
            assert sorted(np.concatenate(half.left)) == sorted(np.concatenate(half.right))


def test_the_picture_of_stages_has_all_rows_on_the_first():
    batch = example_batch(STAGES)
    forward, backward = routed_halves(STAGES, batch)
    assert [rows.size for rows in forward.right] == [4, 4, 0, 0]
    assert sorted(np.concatenate(forward.right)) == sorted(np.concatenate(forward.left))
    for half, sent in ((forward, {0, 1}), (backward, {0, 1, 2, 3})):
        assert {receiver for _, receiver, _ in half.moves} == sent
        assert sum(count for _, _, count in half.moves) == 6


@pytest.mark.parametrize("text_share", [0, 1, 2])
def test_uniform_batches_have_the_asked_number_of_rows(text_share):
    rows = 3072
    batch = TokenBatch.uniform(FAN_IN_4_4, rows, text_share)
    assert [each.count for each in batch.tokens] == [rows, rows]
    assert batch.tokens[0].batch * batch.tokens[0].seq_len == rows * 4 // (4 - text_share)


def test_rows_that_cannot_be_spread_are_refused():
    with pytest.raises(ValueError, match="1000 rows cannot be spread evenly"):
        TokenBatch.uniform(FAN_IN_4_4, 1000)


def test_a_pair_reads_what_it_prints():
    assert all(Pair.parse(str(pair)) == pair for pair in PAIRS)
