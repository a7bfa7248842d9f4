# SPDX-License-Identifier: Apache-2.0
"""Unusual ways to use the bridge's output and gradient, all ranks in this process.

Whole numbers, so comparisons are exact. ``test_bridge_8rank`` has non-contiguous and empty
tensors, gradients that must not be modified, and what runs without a gradient, on real ranks.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.models.mimo.comm.collectives import gather_blocks, take_block
from megatron.core.models.mimo.comm.gather_bridge import ColocatedBridgeCommunicator
from tests.unit_tests.mimo.bridge_cases import BridgeCase
from tests.unit_tests.mimo.in_process_ranks import InProcessWorld

pytestmark = pytest.mark.once

CASES = [
    pytest.param(BridgeCase((("tp", 2), ("dp", 6)), (("tp", 2), ("cp", 3), ("dp", 2))), id="in"),
    pytest.param(BridgeCase((("tp", 8), ("dp", 1)), (("cp", 2), ("tp", 1), ("dp", 4))), id="out"),
    pytest.param(BridgeCase((("tp", 4), ("dp", 2)), (("tp", 1), ("cp", 4), ("dp", 2))), id="equal"),
    pytest.param(BridgeCase((("tp", 4), ("dp", 2)), (("tp", 2), ("pp", 2), ("dp", 2))), id="pp"),
]
Use = Callable[[ColocatedBridgeCommunicator, torch.Tensor, torch.Tensor], int]


def on_all_ranks(case: BridgeCase, use: Use) -> None:
    """``use(bridge, x, gradient)`` runs backward; returns how often the gradient must arrive."""
    batch, gradient = case.drawn(1), case.drawn(2)

    def body(rank: int) -> None:
        bridge = case.bridge()
        x = case.block("src", rank, batch).clone().requires_grad_()
        times = use(bridge, x, case.block("dest", rank, case.own_chunks(rank, gradient)))
        assert torch.equal(x.grad, times * case.block("src", rank, gradient)), rank

    InProcessWorld(case.world_size).run(body)


def output_used_twice(
    bridge: ColocatedBridgeCommunicator, x: torch.Tensor, gradient: torch.Tensor
) -> int:
    y = bridge.communicate(x)
    ((y * gradient).sum() + 2 * (y.transpose(0, 1) * gradient.transpose(0, 1)).sum()).backward()
    return 3


def input_used_twice(
    bridge: ColocatedBridgeCommunicator, x: torch.Tensor, gradient: torch.Tensor
) -> int:
    """Two passes over the bridge in one graph: their collectives pair up in the same order."""
    first, second = bridge.communicate(x), bridge.communicate(2 * x)
    ((first + second) * gradient).sum().backward()
    return 3


def backward_twice(
    bridge: ColocatedBridgeCommunicator, x: torch.Tensor, gradient: torch.Tensor
) -> int:
    y = bridge.communicate(x)
    y.backward(gradient, retain_graph=True)
    y.backward(2 * gradient)
    return 3


def recomputed(bridge: ColocatedBridgeCommunicator, x: torch.Tensor, gradient: torch.Tensor) -> int:
    y = checkpoint(lambda t: bridge.communicate(t * 1.0), x, use_reentrant=False)
    y.backward(gradient)
    return 1


def expanded_gradient(
    bridge: ColocatedBridgeCommunicator, x: torch.Tensor, gradient: torch.Tensor
) -> int:
    """One number, read as every element's gradient and scaled by what each is multiplied with."""
    (bridge.communicate(x) * gradient).sum().backward()
    return 1


def under_autocast(
    bridge: ColocatedBridgeCommunicator, x: torch.Tensor, gradient: torch.Tensor
) -> int:
    """Autocast is for matrix products: what is only moved keeps its dtype."""
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        y = bridge.communicate(x)
    assert y.dtype is x.dtype
    y.backward(gradient)
    return 1


def output_unused(
    bridge: ColocatedBridgeCommunicator, x: torch.Tensor, gradient: torch.Tensor
) -> int:
    """A loss that the output does not enter: zeros arrive, after the same collectives."""
    y = bridge.communicate(x)
    (y.detach().sum() + 0 * y.sum()).backward()
    return 0


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "use",
    [
        output_used_twice,
        input_used_twice,
        backward_twice,
        recomputed,
        expanded_gradient,
        under_autocast,
        output_unused,
    ],
)
def test_every_use_brings_the_whole_gradient(case: BridgeCase, use: Use) -> None:
    on_all_ranks(case, use)


def frozen_on_rank_0(case: BridgeCase, check_shapes: bool) -> None:
    def body(rank: int) -> None:
        bridge = case.bridge()
        bridge.check_shapes = check_shapes
        x = case.block("src", rank, case.drawn(1)).clone().requires_grad_(rank != 0)
        y = bridge.communicate(x)
        (y * torch.ones_like(y, requires_grad=True)).sum().backward()

    InProcessWorld(case.world_size).run(body)


@pytest.mark.parametrize("case", CASES)
def test_a_gradient_that_one_rank_does_not_want(case: BridgeCase) -> None:
    """It leaves the peers waiting in backward; with ``check_shapes`` it is an error in forward."""
    with pytest.raises(AssertionError, match="wait forever: rank"):
        frozen_on_rank_0(case, check_shapes=False)
    message = r"gradient on all or none.*rank 0: .* without gradient, rank \d+: .* with gradient"
    with pytest.raises(ValueError, match=message):
        frozen_on_rank_0(case, check_shapes=True)


def test_a_block_is_a_copy() -> None:
    """A view would keep all of ``x`` alive, and what is added to it would reach ``dy``."""

    def body(rank: int) -> None:
        group = HyperCommGrid([2], ["dp"]).create_pg("dp")
        x = torch.arange(4.0, requires_grad=True)
        y = take_block(x, group, 0)
        assert y.untyped_storage().nbytes() == y.nbytes
        dy = torch.ones(8)
        (dx,) = torch.autograd.grad(gather_blocks(x, group, 0), x, dy)
        assert dx.untyped_storage().data_ptr() != dy.untyped_storage().data_ptr()

    InProcessWorld(2).run(body)


def test_ranks_of_a_replica_hear_why_another_one_cannot_go_on() -> None:
    """All of its stages, and nobody else; numbers of microbatches that differ are a reason, too."""
    case = BridgeCase((("tp", 4), ("dp", 2)), (("tp", 2), ("pp", 2), ("dp", 2)))

    def heard(problems: dict[int, str], counts: dict[int, int]) -> list[dict[int, str]]:
        def body(rank: int) -> dict[int, str]:
            own = {r: text for r, text in problems.items() if r == rank}
            return case.bridge().hear(own, counts.get(rank, 4))

        return InProcessWorld(case.world_size).run(body)

    assert heard({}, {}) == [{}] * 8
    assert heard({2: "no disk"}, {}) == [{2: "no disk"}] * 4 + [{}] * 4
    fewer = {6: "it encodes 3 microbatches, others 4; give all ranks as many"}
    assert heard({}, {6: 3}) == [{}] * 4 + [fewer] * 4
