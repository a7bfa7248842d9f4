# SPDX-License-Identifier: Apache-2.0
"""Differentiable collectives over an explicit group: each forward with its backward, once.

| function        | forward                        | backward                       | collectives |
|-----------------|--------------------------------|--------------------------------|-------------|
| ``gather_blocks`` | all-gather along a dim       | take own block                 | 1 / 0       |
| ``take_block``    | take own block               | all-gather along the dim       | 0 / 1       |
| ``sum_gradients`` | identity                     | sum over the group             | 0 / 1       |
| ``first_gradient`` | identity                    | that of the group's first rank | 0 / 1       |

Legend of the docstrings: ``n`` ranks in the group, this rank has place ``i`` in it; ``b`` rows
along ``dim``; ``x`` is this rank's tensor, ``x_j`` that of the group's ``j``-th rank, ``dy`` the
gradient that comes in. Shapes name ``dim`` only, all others are the same everywhere.

All of them: the group is given, never looked up; the incoming gradient is read, never written;
nothing runs in backward unless the input needs a gradient; non-contiguous tensors are welcome;
a shape that differs between ranks of a group is the caller's error and cannot be seen from one
rank (``check_same_shape`` can, at the price of a collective).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable


def gather_blocks(x: torch.Tensor, group: dist.ProcessGroup, dim: int) -> torch.Tensor:
    """Gather all ranks' blocks along ``dim``, in group order.

    forward:  ``x: (b)``  ->  ``y = [x_0; x_1; ...; x_{n-1}]: (n*b)``, the same on every rank
    backward: ``dy: (n*b)``  ->  ``dx = dy[i*b : (i+1)*b]: (b)``

    The backward only takes its part: ``dy`` is the whole gradient of ``y`` and equal on every
    rank, because consumers are replicas of one another. The naive adjoint (reduce-scatter) would
    count it ``n`` times. Whoever shards the consumer sums ``dy`` first, see ``sum_gradients``.

    Args:
        x: this rank's block; same shape and dtype on every rank of the group.
        group: the ranks to gather from, place in the group = place in the result.
        dim: tensor dim to gather along, ``0 <= dim < x.ndim``.
    """
    return _GatherBlocks.apply(x, _required(group), dim)


def take_block(x: torch.Tensor, group: dist.ProcessGroup, dim: int) -> torch.Tensor:
    """Return this rank's block of a tensor that all ranks of the group hold alike.

    forward:  ``x: (b)``  ->  ``y = x[i*b/n : (i+1)*b/n]: (b/n)``; no communication
    backward: ``dy: (b/n)``  ->  ``dx = [dy_0; dy_1; ...; dy_{n-1}]: (b)``

    The naive adjoint pads ``dy`` with zeros: right for one rank on its own, but ``x`` is one
    activation that ``n`` ranks hold and each consumes a different block of, so its gradient is
    everybody's blocks together.

    Args:
        x: the tensor, equal on every rank of the group; ``n`` divides its size along ``dim``.
        group: the ranks that share ``x``, place in the group = block.
        dim: tensor dim to cut, ``0 <= dim < x.ndim``.
    """
    return _TakeBlock.apply(x, _required(group), dim)


def sum_gradients(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Return the tensor itself; its gradient is summed over the group.

    forward:  ``x: (b)``  ->  ``y = x: (b)``; no communication
    backward: ``dy: (b)``  ->  ``dx = dy_0 + dy_1 + ... + dy_{n-1}: (b)``, the same on every rank

    For an ``x`` that all ranks hold and each uses a part of (context parallelism: own sequence
    chunks). The naive adjoint of the identity keeps ``dy`` as it is, which is zero outside this
    rank's part. Where parts do not overlap each element has one addend that is not zero, so
    the sum is exact in any dtype.

    Args:
        x: the tensor, equal on every rank of the group.
        group: the ranks that use a part of it each.
    """
    return _SumGradients.apply(x, _required(group))


def first_gradient(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Return the tensor itself; its gradient is that of the group's first rank.

    forward:  ``x: (b)``  ->  ``y = x: (b)``; no communication
    backward: ``dy: (b)``  ->  ``dx = dy_0: (b)``, the same on every rank

    For an ``x`` that all ranks hold and the first one alone uses (the first of several pipeline
    stages). The sum of all gradients would be the same, since the others' are zero; so these are
    not moved.

    Args:
        x: the tensor, equal on every rank of the group.
        group: the ranks that hold it; the one with the lowest global rank uses it.
    """
    return _FirstGradient.apply(x, _required(group))


def check_same_shape(x: torch.Tensor, group: dist.ProcessGroup, what: str) -> None:
    """Compare tensors over a group: one small all-gather, and a wait for its result.

    Compared are shape, dtype and whether a gradient is wanted. For debugging: unequal shapes in
    a collective hang, abort or give garbage, depending on the backend, and a rank that wants no
    gradient leaves the others waiting in backward. Every rank of the group must call it.

    Args:
        x: this rank's tensor.
        group: the ranks that must agree.
        what: what the tensor is, for the message.

    Raises:
        ValueError: on every rank of the group, if any two differ; lists them by global rank.
    """
    mine = torch.tensor(_signature(x), dtype=torch.int64, device=x.device)
    table = _all_gather(mine.unsqueeze(0), _required(group), 0).tolist()
    if all(row == table[0] for row in table):
        return
    found = ", ".join(
        f"rank {rank}: {_read_signature(row)}"
        for rank, row in zip(dist.get_process_group_ranks(group), table, strict=True)
    )
    raise ValueError(
        f"{what} must have one shape and dtype on all ranks of a group, and a gradient on all or "
        f"none, got {found}. Give each of these ranks the same number of samples (and tokens per "
        "sample), and freeze an encoder on all ranks alike."
    )


class _GatherBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup, dim: int) -> torch.Tensor:
        ctx.dim, ctx.index = dim, dist.get_rank(group)
        ctx.count = dist.get_world_size(group)
        return _all_gather(x, group, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _own_block(dy, ctx.index, ctx.count, ctx.dim, _gradients), None, None


class _TakeBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup, dim: int) -> torch.Tensor:
        ctx.dim, ctx.group = dim, group
        return _own_block(x, dist.get_rank(group), dist.get_world_size(group), dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _all_gather(dy, ctx.group, ctx.dim), None, None


class _SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None]:
        # A copy: all_reduce writes in place, and autograd may still hand dy to someone else.
        total = dy.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _FirstGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None]:
        # A copy, as in the sum above.
        first = dy.clone(memory_format=torch.contiguous_format)
        dist.broadcast(first, dist.get_process_group_ranks(ctx.group)[0], group=ctx.group)
        return first, None


class ReusedMemory:
    """Memory of the host for one tensor at a time, used again when nobody has that tensor any more.

    The system hands out large blocks of memory page by page when they are first written, which
    takes longer than the copy that is written; and a tensor that is dropped gives its block back.
    Whoever keeps the tensor or a view of it keeps the memory, and others get some of their own.
    """

    def __init__(self) -> None:
        self._block = np.empty(0, dtype=np.uint8)
        self._lease: Callable[[], np.ndarray | None] = lambda: None

    def empty_like(self, x: torch.Tensor) -> torch.Tensor:
        """Return a contiguous tensor of the same shape, dtype and device, of any values."""
        if x.device.type != "cpu" or x.nbytes < _LARGE or self._lease() is not None:
            return torch.empty_like(x, memory_format=torch.contiguous_format)
        if self._block.size < x.nbytes:
            self._block = np.empty(x.nbytes, dtype=np.uint8)
        # The tensor's storage holds this array, so it lives as long as any view of the tensor.
        lease = self._block[: x.nbytes]
        self._lease = weakref.ref(lease)
        return torch.from_numpy(lease).view(x.dtype).view(x.shape)


# Smaller blocks come from memory that the process has already.
_LARGE = 2**17
_gradients = ReusedMemory()


def _own_block(
    x: torch.Tensor, index: int, count: int, dim: int, memory: ReusedMemory | None = None
) -> torch.Tensor:
    """The ``index``-th of ``count`` blocks, copied.

    A view would keep all of ``x`` alive, and a gradient that is one lets autograd's accumulation
    write into the incoming gradient: a leaf takes the tensor that it is given for its ``grad``, and
    adds to it in place, while ``x`` may be the ``grad`` of another one.
    """
    assert x.shape[dim] % count == 0, (tuple(x.shape), dim, count)
    size = x.shape[dim] // count
    block = x.narrow(dim, index * size, size)
    if memory is None:
        return block.clone(memory_format=torch.contiguous_format)
    return memory.empty_like(block).copy_(block)


def _all_gather(x: torch.Tensor, group: dist.ProcessGroup, dim: int) -> torch.Tensor:
    """Blocks of all ranks along ``dim``; the collective itself concatenates along dim 0 only."""
    block = x.movedim(dim, 0).contiguous()
    count = dist.get_world_size(group)
    whole = block.new_empty((count * block.shape[0], *block.shape[1:]))
    dist.all_gather_into_tensor(whole, block, group=group)
    return whole.movedim(0, dim).contiguous()


def _required(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    # None means the whole world to torch.distributed: a wrong result without any error.
    if group is None:
        raise ValueError(
            "The process group is None; pass the group that the tensor is shared over "
            "(torch.distributed.group.WORLD if it is all ranks)."
        )
    return group


# Enough for any activation; a signature is [wants gradient, dtype, ndim, dims..., zeros].
_MAX_NDIM = 8
_DTYPES = sorted(
    {value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str
)


def _signature(x: torch.Tensor) -> list[int]:
    dims = list(x.shape)
    wanted = int(x.requires_grad and torch.is_grad_enabled())
    return [wanted, _DTYPES.index(x.dtype), len(dims), *dims, *[0] * (_MAX_NDIM - len(dims))]


def _read_signature(row: list[int]) -> str:
    wanted, dtype, ndim, *dims = row
    return f"{tuple(dims[:ndim])} {_DTYPES[dtype]} {'with' if wanted else 'without'} gradient"
