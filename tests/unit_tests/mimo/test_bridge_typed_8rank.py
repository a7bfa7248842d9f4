# SPDX-License-Identifier: Apache-2.0
"""A second opinion on the bridge: the typed collectives of ``spmd_types``, on 8 real ranks.

Written elsewhere and by others, they say by types what a tensor is over a group: ``S(b)`` one
block each, ``I`` one value held by all and used by all alike, ``R`` one value held by all of which
each makes its own use. With them a bridge is two lines, of which each knows its own backward:

    fan-in   over the gather group   all-gather S(b) -> I       backward: take own block
    fan-out  over the gather group   convert I -> S(b)          backward: all-gather
    both     over dest CP            convert I -> R             backward: all-reduce

The bridge and this composition agree bit for bit: outputs, and input gradients for gradients that
differ over CP. Tensors hold whole numbers, so the sums over CP have one value in any order.
"""

from __future__ import annotations

import pytest
import spmd_types
import torch
import torch.distributed as dist

from megatron.core.models.mimo.comm.gather_bridge import ColocatedBridgeCommunicator
from tests.unit_tests.mimo.bridge_cases import BridgeCase

# Nothing of Megatron-Core's is in them.
pytestmark = [pytest.mark.ranks(8), pytest.mark.once]


def dims(**sizes: int) -> tuple[tuple[str, int], ...]:
    return tuple(sizes.items())


CASES = [
    BridgeCase(dims(tp=2, dp=4), dims(tp=2, cp=2, dp=2)),
    BridgeCase(dims(tp=1, dp=8), dims(cp=4, tp=1, dp=2), view="sequence first"),
    BridgeCase(dims(tp=1, dp=8), dims(tp=2, cp=2, dp=2), view="rows"),
    BridgeCase(dims(tp=2, dp=4), dims(tp=8, cp=1, dp=1)),
    BridgeCase(dims(tp=4, dp=2), dims(tp=1, cp=2, dp=4)),
    BridgeCase(dims(tp=8, dp=1), dims(cp=2, tp=2, dp=2), view="sequence first"),
    BridgeCase(dims(tp=8, dp=1), dims(tp=1, cp=1, dp=8), view="rows"),
    BridgeCase(dims(tp=4, dp=2), dims(tp=1, cp=4, dp=2)),
]


def typed_bridge(bridge: ColocatedBridgeCommunicator, x: torch.Tensor) -> torch.Tensor:
    """The same map by types; ``bridge`` lends its groups and the number of the batch dim."""
    block, same, used = spmd_types.S(bridge.dim_mapping["b"]), spmd_types.I, spmd_types.R
    if bridge.is_fan_in():
        x = spmd_types.all_gather(x, bridge.gather_pg, src=block, dst=same)
    elif bridge.is_fan_out():
        x = spmd_types.convert(x, bridge.gather_pg, src=same, dst=block)
    if bridge.dest_cp_pg is None:
        return x
    return spmd_types.convert(x, bridge.dest_cp_pg, src=same, dst=used)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.src}-{c.dest}")
def test_bridge_is_the_typed_one(case: BridgeCase, rank_device: torch.device) -> None:
    rank = dist.get_rank()
    bridge = case.bridge()
    dist.barrier()
    block = case.block("src", rank, case.drawn(1)).to(rank_device)
    mine, theirs = (block.clone().requires_grad_() for _ in range(2))
    ours, typed = bridge.communicate(mine), typed_bridge(bridge, theirs)
    assert torch.equal(ours, typed)
    gradient = case.block("dest", rank, case.drawn(10 + case.places[rank]["dest cp"]))
    for output in (ours, typed):
        output.backward(gradient.contiguous().to(rank_device))
    assert torch.equal(mine.grad, theirs.grad)
    dist.barrier()
    bridge.destroy()
    bridge.dest_grid.destroy()
