# SPDX-License-Identifier: Apache-2.0
"""Each pair of the collectives' table on its own, against tensors that every rank can compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist

from megatron.core.models.mimo.comm.collectives import (
    check_same_shape,
    gather_blocks,
    sum_gradients,
    take_block,
)

pytestmark = pytest.mark.once

CALLS = [
    pytest.param(lambda x, group: gather_blocks(x, group, 0), id="gather_blocks"),
    pytest.param(lambda x, group: take_block(x, group, 0), id="take_block"),
    pytest.param(sum_gradients, id="sum_gradients"),
    pytest.param(lambda x, group: check_same_shape(x, group, "x"), id="check_same_shape"),
]


@pytest.mark.parametrize("call", CALLS)
def test_no_group_is_not_the_whole_world(
    call: Callable[[torch.Tensor, dist.ProcessGroup | None], object],
) -> None:
    with pytest.raises(ValueError, match="process group is None; pass the group"):
        call(torch.zeros(4, device="cpu"), None)


@pytest.fixture
def group() -> Iterator[dist.ProcessGroup]:
    """Four of the eight ranks, not neighbours: even and odd ones."""
    group, _ = dist.new_subgroups_by_enumeration([[0, 2, 4, 6], [1, 3, 5, 7]])
    # A group that one rank destroys while another still connects fails there.
    dist.barrier()
    yield group
    dist.destroy_process_group(group)


def drawn(seed: int, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device)


def place() -> tuple[int, int]:
    """(index in the group, which of the two groups)"""
    return dist.get_rank() // 2, dist.get_rank() % 2


@pytest.mark.ranks(8)
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_gather_blocks(group: dist.ProcessGroup, dim: int, rank_device: torch.device) -> None:
    index, colour = place()
    shape = [2, 3, 5]
    shape[dim] *= 4
    whole = drawn(colour, tuple(shape), rank_device)
    gradient = drawn(10 + colour, tuple(shape), rank_device)
    x = whole.chunk(4, dim)[index].clone().requires_grad_()
    y = gather_blocks(x, group, dim)
    assert torch.equal(y, whole)
    assert y.is_contiguous()
    y.backward(gradient)
    assert torch.equal(x.grad, gradient.chunk(4, dim)[index])


@pytest.mark.ranks(8)
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_take_block(group: dist.ProcessGroup, dim: int, rank_device: torch.device) -> None:
    index, colour = place()
    shape = [2, 3, 5]
    shape[dim] *= 4
    x = drawn(colour, tuple(shape), rank_device).requires_grad_()
    gradient = drawn(10 + colour, tuple(shape), rank_device)
    y = take_block(x, group, dim)
    assert torch.equal(y, x.detach().chunk(4, dim)[index])
    assert y.is_contiguous()
    y.backward(gradient.chunk(4, dim)[index])
    assert torch.equal(x.grad, gradient)


@pytest.mark.ranks(8)
def test_sum_gradients(group: dist.ProcessGroup, rank_device: torch.device) -> None:
    index, colour = place()
    x = drawn(colour, (3, 5), rank_device).requires_grad_()
    # Whole numbers: their sum does not depend on the order of the addends.
    gradients = [drawn(10 * i + colour, (3, 5), rank_device).mul(100).round() for i in range(4)]
    y = sum_gradients(x, group)
    assert torch.equal(y, x)
    mine = gradients[index].clone()
    y.backward(mine)
    assert torch.equal(x.grad, torch.stack(gradients).sum(0))
    assert torch.equal(mine, gradients[index])


@pytest.mark.ranks(8)
def test_take_and_gather_undo_each_other(
    group: dist.ProcessGroup, rank_device: torch.device
) -> None:
    _, colour = place()
    x = drawn(colour, (8, 3), rank_device).requires_grad_()
    y = gather_blocks(take_block(x, group, 0), group, 0)
    gradient = drawn(10 + colour, (8, 3), rank_device)
    y.backward(gradient)
    assert torch.equal(y, x)
    assert torch.equal(x.grad, gradient)


@pytest.mark.ranks(8)
def test_second_derivative_is_refused_not_wrong(
    group: dist.ProcessGroup, rank_device: torch.device
) -> None:
    x = drawn(place()[1], (4, 3), rank_device).requires_grad_()
    (first,) = torch.autograd.grad((sum_gradients(x, group) ** 2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.ranks(8)
def test_check_same_shape_names_every_rank(
    group: dist.ProcessGroup, rank_device: torch.device
) -> None:
    index, colour = place()
    check_same_shape(torch.zeros(2 + colour, 3, device=rank_device), group, "x")
    ranks = "".join(rf"rank {2 * i + colour}: \({4 if i == 3 else 2}, 3\) .*" for i in range(4))
    with pytest.raises(ValueError, match=rf"images must have one shape and dtype.*{ranks}"):
        check_same_shape(
            torch.zeros(4 if index == 3 else 2, 3, device=rank_device), group, "images"
        )
    with pytest.raises(ValueError, match=r"\(6,\) .* \(2, 3\) "):
        check_same_shape(torch.zeros((2, 3) if index else (6,), device=rank_device), group, "x")
