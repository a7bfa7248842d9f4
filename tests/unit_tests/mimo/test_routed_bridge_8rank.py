# SPDX-License-Identifier: Apache-2.0
"""The routed bridge on 8 real ranks: what threads of one process cannot show.

Layouts, counts of collectives and errors are tried in ``test_routed_bridge``; here are the
backend's own uneven splits, empty messages, dtypes and waiting. A rank that waits in vain ends with
the test's deadline.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.models.mimo.comm.gather_bridge import ColocatedBridgeCommunicator
from megatron.core.models.mimo.partition.sequence_order import dense_positions
from tests.unit_tests.mimo.balanced_cases import check_balanced_encoder
from tests.unit_tests.mimo.routed_cases import (
    EQUAL,
    FAN_IN,
    FAN_OUT,
    HIDDEN,
    Picture,
    bridge,
    random_masks,
)

# Nothing of Megatron-Core's is in them.
pytestmark = [pytest.mark.ranks(8, timeout=90), pytest.mark.once]

ONE_SAMPLE = ((1, 8), (2, 4, 1))


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tp_copies", "sp"])
@pytest.mark.parametrize(
    ("src", "dest"), [FAN_IN, FAN_OUT, EQUAL, ONE_SAMPLE], ids=["in", "out", "equal", "one_sample"]
)
def test_uneven_rows_and_their_gradients(src, dest, sequence_parallel, rank_device):
    with bridge(src, dest, dist.barrier, sequence_parallel=sequence_parallel) as made:
        batch = 1 if dest[2] == 1 else 3
        masks = random_masks(dest[2], 8 * dest[1] * dest[0], batch)
        if dest[2] == 1:
            masks = [np.random.default_rng(2).random(masks[0].shape) < 0.8]
        for dtype in (torch.float32, torch.bfloat16):
            Picture(made, masks, rank_device, dtype).check(made)


@pytest.mark.parametrize(("src", "dest"), [FAN_IN, FAN_OUT, EQUAL], ids=["in", "out", "equal"])
def test_equal_to_the_gather_bridge(src, dest, rank_device):
    """Uniform tokens: both bridges give the same rows at the same places, and gradients."""
    batch, seq_len = 4, 4 * dest[1] * dest[0]
    masks = [np.ones((batch, seq_len), dtype=bool)] * dest[2]
    with bridge(src, dest, dist.barrier, sequence_parallel=True) as made:
        picture = Picture(made, masks, rank_device, torch.float32)
        fused, gradient = picture.run(made, picture.plan(made))
        grids = (
            HyperCommGrid(list(src), ["tp", "dp"]),
            HyperCommGrid(list(dest), ["tp", "cp", "dp"]),
        )
        gather = ColocatedBridgeCommunicator(*grids, dim_mapping={"b": 0, "h": 1})
        held = picture.rows[picture.mine].clone().requires_grad_()
        rows = gather.communicate(held).view(batch, seq_len, HIDDEN).transpose(0, 1)
        at = grids[1].coords(dist.get_rank())
        kept = dense_positions(seq_len, at["cp"], dest[1], at["tp"], dest[0])
        assert torch.equal(rows[kept].reshape(-1, HIDDEN), fused)
        # Under the gather bridge every TP rank has the gradient of its CP rank's whole part.
        cp_kept = dense_positions(seq_len, at["cp"], dest[1])
        first = picture.group.dest_of[picture.group.index(dist.get_rank())] * batch * seq_len
        whole = picture.gradient[first : first + batch * seq_len]
        rows[cp_kept].backward(whole.view(batch, seq_len, HIDDEN).transpose(0, 1)[cp_kept])
        assert torch.equal(held.grad, gradient)
        dist.barrier()
        gather.destroy()
        for grid in grids:
            grid.destroy()


@pytest.mark.parametrize(
    ("src", "dest"), [((1, 8), (2, 2, 2)), ((4, 2), (1, 1, 8))], ids=["fan_in", "fan_out"]
)
def test_every_combination_of_empty_and_non_empty_ranks(src, dest, rank_device):
    """Forward and backward: nobody waits for a rank without rows."""
    with bridge(src, dest, dist.barrier) as made:
        group = made.layout.group_of(dist.get_rank())
        encoders, languages = group.src_dps.size, group.dest_dps.size
        for has_rows in itertools.product([0, 1], repeat=encoders):
            for has_tokens in itertools.product([0, 1], repeat=languages):
                if any(has_rows) == any(has_tokens):
                    masks = [np.full((1, 12), bool(has_tokens[dp % languages]))
                             for dp in range(dest[2])]  # fmt: skip
                    total = 12 * sum(has_tokens)
                    cuts = (np.cumsum(has_rows) * total // max(sum(has_rows), 1))[:-1].tolist()
                    Picture(made, masks, rank_device, cuts=cuts).check(made)


@pytest.mark.parametrize(
    ("src", "dest", "options"),
    [(*FAN_IN, {}), (*FAN_OUT, {"one_group": True}), (*ONE_SAMPLE, {"sequence_parallel": True})],
    ids=["in", "out", "one_sample"],
)
def test_pixels_of_a_balanced_encoder(src, dest, options, rank_device):
    """They travel by the backend's all-to-all, and their rows from where they were encoded."""
    with bridge(src, dest, dist.barrier, **options) as made:
        before, after = check_balanced_encoder(made, random_masks(dest[2], 64), rank_device)
        spread = torch.tensor([before, after], device=rank_device)
        dist.all_reduce(spread, dist.ReduceOp.MAX)
        assert after < before or before == 1
        assert spread[1] < spread[0]


def test_3_to_2_on_6_of_the_8_ranks(rank_device):
    with bridge((2, 3), (1, 3, 2), dist.barrier) as made:
        if dist.get_rank() < 6:
            assert made.exchange.size == 6
            Picture(made, random_masks(2, 12), rank_device).check(made)
        else:
            assert made.exchange is None
            with pytest.raises(ValueError, match="Rank [67] is not on the bridge .* 0 to 5"):
                made.move(torch.zeros(1, HIDDEN, device=rank_device), None)


def test_after_a_mismatch_nobody_is_left_in_a_collective(rank_device):
    with bridge(*FAN_IN, dist.barrier) as made:
        picture = Picture(made, [np.ones((2, 16), dtype=bool)] * 2, rank_device)
        plan, rows = picture.plan(made), picture.rows[picture.mine]
        odd = dist.get_rank() in (2, 6)
        stated: dict[str, Any] = {"plan": plan, "rows": rows.float() if odd else rows}
        problem = {"problem": "no" if odd else None}
        for changed, message in (({}, "rows' dtype"), (problem, "nothing was moved")):
            with pytest.raises(ValueError, match=message) as error:
                made.confirm(**stated | changed)
            texts: list[str | None] = [None] * 4
            dist.all_gather_object(texts, str(error.value), group=made.control)
            assert len(set(texts)) == 1
        picture.check(made)


def test_what_turns_out_otherwise_after_it_was_announced(rank_device):
    """The odd rank takes part in the exchange; then all raise, and the next one is as ever."""
    with bridge(*FAN_IN, dist.barrier) as made:
        picture = Picture(made, [np.ones((2, 16), dtype=bool)] * 2, rank_device)
        plan, rows = picture.plan(made), picture.rows[picture.mine]
        odd = dist.get_rank() in (2, 6)
        for late, message in (
            ({"problem": "no"}, "what was moved is not used. rank [26]: no"),
            ({"rows": rows[1:]}, "rank [26] brings 15, the plan expects 16"),
            ({"rows": rows.float()}, "rank [26]: its rows are 3 wide and torch.float32"),
        ):
            made.announce(plan, rows[:0])
            stated: dict[str, Any] = {"plan": plan, "rows": rows}
            own = made.move(made.confirm(**stated | (late if odd else {})), plan)
            assert own.shape[0] == plan.own
            with pytest.raises(ValueError, match=message) as error:
                made.settle()
            texts: list[str | None] = [None] * 4
            dist.all_gather_object(texts, str(error.value), group=made.control)
            assert len(set(texts)) == 1
        made.announce(plan, rows[:0])
        made.confirm(plan, rows)
        picture.check(made, plan)
        made.settle()
