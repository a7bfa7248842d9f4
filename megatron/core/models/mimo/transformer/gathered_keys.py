# SPDX-License-Identifier: Apache-2.0
"""Keys and values of all ranks' tokens, of which a rank keeps its own until backward.

Attention over a context-parallel group reads the keys and values of all its ranks. Kept for
backward, each rank would have all of them for every layer, however many ranks share a sequence. So
what is kept is the rank's own part, and backward gathers again, once per layer.

What PyTorch's attention saves is found by its storage, with ``saved_tensors_hooks``: nothing is
computed twice. Hooks of an outer context do not see what is saved inside.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# From a rank's keys and values ``(t, …)``: those that its queries see, of all ranks.
Gather = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies in what was gathered."""

    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class GatheredKeys:
    """Keys and values of all ranks' tokens between the two passes of one attention.

    Args:
        whole: what was gathered.
        gather: makes them from ``local``, with collectives that all ranks of the group enter.
        local: this rank's part of them, which is kept. What was gathered again is dropped when its
            gradient is there.
    """

    def __init__(self, whole: Tensor, gather: Gather, local: Tensor) -> None:
        self._whole: int | None = _storage(whole)
        self._local, self._gather = local.detach(), gather
        self._again: list[Tensor] = []
        if local.requires_grad:
            local.register_hook(lambda _: self._again.clear())

    def leaving_out(self) -> AbstractContextManager[Any]:
        """Return a context: what is saved in it for backward leaves out keys and values."""
        if not torch.is_grad_enabled():
            return nullcontext()
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def before_backward(self, out: Tensor) -> Tensor:
        """Return ``out``, whose gradient gathers again before it goes on.

        Every rank's does, one without a real query too: it calls nothing that needs the keys, and
        the others wait for it.
        """
        # From now on the storage may be another's.
        self._whole = None
        return _GatherAgain.apply(out, self)

    def gather_again(self) -> None:
        """Gather for the backward pass; a collective."""
        self._again = [self._gather(self._local)]

    def _pack(self, tensor: Tensor) -> Tensor | _Place:
        if _storage(tensor) != self._whole or not tensor.numel():
            return tensor
        return _Place(tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def _unpack(self, packed: Tensor | _Place) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        (whole,) = self._again
        return whole.as_strided(packed.size, packed.stride, packed.offset)


class _GatherAgain(torch.autograd.Function):
    """Identity; in backward, keys and values are gathered before the gradient goes on.

    Forward: ``y = x``. Gradient: ``dx = dy``.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, keys: GatheredKeys) -> Tensor:
        """Return a view of ``x``."""
        ctx.keys = keys
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Gather, then hand the gradient on."""
        ctx.keys.gather_again()
        return grad, None


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
