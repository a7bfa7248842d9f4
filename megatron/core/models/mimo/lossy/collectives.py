# SPDX-License-Identifier: Apache-2.0
"""Megatron's tensor-parallel collectives over links that lose packets, forward and backward.

| layer                      | forward          | backward         |
|----------------------------|------------------|------------------|
| row-parallel               | ``total``        | identity         |
| row-parallel, SP           | ``scatter_total``| ``gather``       |
| column-parallel            | identity         | ``total``        |
| column-parallel, SP        | ``gather``       | ``scatter_total``|

Backward is the gradient of the lossless pair: who sends does not know what is lost, so a
contribution that was lost in forward still gets its gradient, over the links of backward.

All: ``n`` ranks of ``group``; ``x`` is read, never written; a place of None loses nothing. Without
loss the result is that of Megatron's own call, bit for bit. At the sender the one message is ``x``.
At the receiver messages come from each other rank; this needs one more collective, in which the
contributions come apart, so it is slower and no measure of time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from megatron.core.models.mimo.lossy.place import Place
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)

Function = Callable[[torch.Tensor], torch.Tensor]


def apply(x: torch.Tensor, there: Function, back: Function) -> torch.Tensor:
    """Return ``there(x)``; its gradient goes through ``back``."""
    return _Apply.apply(x, there, back)


def identity(x: torch.Tensor) -> torch.Tensor:
    """Return the tensor itself."""
    return x


def total(x: torch.Tensor, group: Any, place: Place | None) -> torch.Tensor:
    """Return the sum of ``x`` over the group, ``(…)`` -> ``(…)``."""
    if place is None or not place.at_receiver:
        return _summed(x if place is None else place.carry(x, None), x, group)
    blocks = _gathered(x.unsqueeze(0), group).unbind()
    arrived = _received(blocks, group, place)
    whole = _summed(x, x, group)
    return whole if arrived is None else torch.stack(arrived).sum(0)


def gather(x: torch.Tensor, group: Any, place: Place | None) -> torch.Tensor:
    """Return all ranks' blocks along dim 0, ``(b, …)`` -> ``(n b, …)``."""
    if place is None or not place.at_receiver:
        return _gathered(x if place is None else place.carry(x, None), group)
    whole = _gathered(x, group)
    arrived = _received(whole.chunk(group.size()), group, place)
    return whole if arrived is None else torch.cat(arrived)


def scatter_total(x: torch.Tensor, group: Any, place: Place | None) -> torch.Tensor:
    """Return this rank's block along dim 0 of the sum, ``(n b, …)`` -> ``(b, …)``."""
    if place is None or not place.at_receiver:
        x = x if place is None else place.carry(x, None)
        return reduce_scatter_to_sequence_parallel_region(x, group=group)
    x = x.contiguous()
    blocks = torch.empty_like(x)
    dist.all_to_all_single(blocks, x, group=group)
    arrived = _received(blocks.chunk(group.size()), group, place)
    whole = reduce_scatter_to_sequence_parallel_region(x, group=group)
    return whole if arrived is None else torch.stack(arrived).sum(0)


def _received(blocks: Any, group: Any, place: Place) -> list[torch.Tensor] | None:
    """What arrives of each rank's block; None if all of all. One's own is not sent."""
    own, ranks = group.rank(), dist.get_process_group_ranks(group)
    arrived = [
        block if i == own else place.carry(block, ranks[i]) for i, block in enumerate(blocks)
    ]
    intact = all(after is before for after, before in zip(arrived, blocks, strict=True))
    return None if intact else arrived


def _summed(x: torch.Tensor, kept: torch.Tensor, group: Any) -> torch.Tensor:
    # Megatron's sum writes into what it is given if that is contiguous, and returns it.
    own = x.is_contiguous() and x.data_ptr() != kept.data_ptr()
    fresh = x if own else x.clone(memory_format=torch.contiguous_format)
    return reduce_from_tensor_model_parallel_region(fresh, group=group)


def _gathered(x: torch.Tensor, group: Any) -> torch.Tensor:
    return gather_from_sequence_parallel_region(x, group=group)


class _Apply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, there: Function, back: Function) -> torch.Tensor:
        ctx.back = back
        y = there(x)
        return x.view_as(x) if y is x else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.back(dy), None, None
