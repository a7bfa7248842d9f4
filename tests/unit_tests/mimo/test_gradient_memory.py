# SPDX-License-Identifier: Apache-2.0
"""Whose memory the gradient is that a gather hands back: a copy, in memory that is used again."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron.core.models.mimo.comm import collectives
from megatron.core.models.mimo.comm.collectives import ReusedMemory, gather_blocks
from tests.unit_tests.mimo.in_process_ranks import InProcessWorld

# Of fp32 rows as large as what comes from the system page by page.
ROWS, WIDTH = 64, 1024


def view(
    x: torch.Tensor, index: int, count: int, dim: int, _memory: ReusedMemory | None = None
) -> torch.Tensor:
    """What is handed back without a copy, as in stock's bridge."""
    size = x.shape[dim] // count
    return x.narrow(dim, index * size, size).contiguous()


def summed(rank: int) -> tuple[bool, bool, bool]:
    """(rows' gradient, another leaf's, the gradient that was given) are what they must be."""
    x = torch.zeros(ROWS, WIDTH, requires_grad=True)
    beside = torch.zeros(2 * ROWS, WIDTH, requires_grad=True)
    gradient = torch.arange(2.0 * ROWS * WIDTH).view(2 * ROWS, WIDTH)
    given, group = gradient.clone(), dist.new_group([0, 1], use_local_synchronization=True)
    for _ in range(3):
        # The sum hands one and the same gradient to both, the factor makes it one of its own. What
        # was called first has its backward last: then nobody else has the gradient, and the leaf
        # takes it as it is.
        other = beside.view(2 * ROWS, WIDTH)
        ((gather_blocks(x, group, 0) + other) * 1).backward(given)
    for _ in range(3):
        gather_blocks(x, group, 0).backward(given)
    own = gradient.chunk(2)[rank]
    return (
        torch.equal(x.grad, 6 * own),
        torch.equal(beside.grad, 3 * gradient),
        torch.equal(given, gradient),
    )


def test_gradients_that_are_summed_do_not_write_into_one_another() -> None:
    assert InProcessWorld(2).run(summed) == [(True, True, True)] * 2


def test_a_view_lets_them_write_into_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the test above, and why there is a copy."""
    monkeypatch.setattr(collectives, "_own_block", view)
    for rows, beside, given in InProcessWorld(2).run(summed):
        assert (rows, beside, given) == (False, False, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_memory_that_nobody_has_any_more_is_used_again(dtype: torch.dtype) -> None:
    memory, like = ReusedMemory(), torch.zeros(ROWS, 2 * WIDTH, dtype=dtype)
    first = memory.empty_like(like).fill_(1)
    assert (first.shape, first.dtype, first.is_contiguous()) == (like.shape, dtype, True)
    at = first.data_ptr()
    part = first[3:5].view(-1)
    del first
    second = memory.empty_like(like).fill_(2)  # a view of the first is still there
    assert second.data_ptr() != at
    assert (part == 1).all()
    del part
    third = memory.empty_like(like[: ROWS // 2 * 2])
    assert third.data_ptr() == at
    assert (second == 2).all()
    del third
    larger = memory.empty_like(torch.cat([like, like]))
    assert larger.shape == (2 * ROWS, 2 * WIDTH)


def test_small_and_strided_tensors() -> None:
    memory = ReusedMemory()
    small = memory.empty_like(torch.zeros(3, 2))
    assert small.data_ptr() != memory.empty_like(torch.zeros(3, 2)).data_ptr()
    strided = torch.zeros(2 * WIDTH, ROWS).t()
    assert memory.empty_like(strided).stride() == (2 * WIDTH, 1)
    assert memory.empty_like(torch.zeros(0, 4)).shape == (0, 4)


def test_a_gradient_that_is_dropped_lends_its_memory_to_the_next() -> None:
    def pointers(rank: int) -> tuple[bool, bool]:
        group = dist.new_group([0, 1], use_local_synchronization=True)
        x = torch.zeros(ROWS, WIDTH, requires_grad=True)
        found = []
        for kept in (False, False, True):
            gather_blocks(x, group, 0).sum().backward()
            found.append(x.grad.data_ptr())
            assert torch.equal(x.grad, torch.ones_like(x))
            if not kept:
                x.grad = None
        x.grad = x.grad + 0  # the first rank's is free for the second rank
        return found[0] == found[1] == found[2], len(found) == 3

    assert InProcessWorld(2).run(pointers) == [(True, True)] * 2
