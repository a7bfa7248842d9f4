# SPDX-License-Identifier: Apache-2.0
"""A stand-in for PyTorch's ``varlen_attn``, which runs on CUDA only: the same arguments."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from megatron.core.models.mimo.transformer import context_parallel_attention


@dataclass
class VarlenStandIn:
    """Attention of segments by the formula. It keeps for backward what the kernel keeps.

    Attributes:
        to_last_key: a causal mask is aligned to the last key of a segment; the first otherwise.
        reads: context in which it reads the lengths, as the kernel does on its device.
        segments: of each call, how many.
    """

    to_last_key: bool = True
    reads: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    segments: list[int] = field(default_factory=list)

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
        enable_gqa: bool = False,
    ) -> Tensor:
        """Attend; ``(t, heads, d)``."""
        assert query.dim() == key.dim() == value.dim() == 3
        assert all(x.stride(-1) == 1 for x in (query, key, value))
        assert enable_gqa or query.size(1) == key.size(1)
        assert window_size in ((-1, -1), (-1, 0))
        for bounds, longest, rows in ((cu_seq_q, max_q, query), (cu_seq_k, max_k, key)):
            assert bounds.dtype == torch.int32
            assert bounds.is_contiguous()
            with self.reads():
                read = bounds.tolist()
            assert (read[0], read[-1]) == (0, rows.size(0))
            assert max(b - a for a, b in pairwise(read)) == longest
        self.segments.append(cu_seq_q.numel() - 1)
        return _Kernel.apply(query, key, value, cu_seq_q, cu_seq_k, self, scale, window_size[1])

    @contextlib.contextmanager
    def in_place(self) -> Iterator[VarlenStandIn]:
        """Have it serve all tensors."""

        def serve(*tensors: Tensor) -> VarlenStandIn:  # a mock would keep them
            return self

        with mock.patch.object(context_parallel_attention, "varlen_kernel", serve):
            yield self

    def attend(
        self, tensors: tuple[Tensor, ...], bounds: tuple[Tensor, Tensor], scale: Any, right: int
    ) -> Tensor:
        """The formula, segment by segment."""
        query, key, value = tensors
        with self.reads():
            spans = [list(pairwise(each.tolist())) for each in bounds]
        out = []
        for (q_start, q_stop), (k_start, k_stop) in zip(*spans, strict=True):
            q, k, v = query[q_start:q_stop], key[k_start:k_stop], value[k_start:k_stop]
            repeat = q.size(1) // k.size(1)
            k, v = (x.repeat_interleave(repeat, dim=1) for x in (k, v))
            scores = torch.einsum("ihd,jhd->hij", q, k) * (scale or q.size(-1) ** -0.5)
            if right == 0:
                offset = k.size(0) - q.size(0) if self.to_last_key else 0
                seen = torch.ones_like(scores[0], dtype=torch.bool).tril(offset)
                scores = scores.masked_fill(~seen, -torch.inf)
            out.append(torch.einsum("hij,jhd->ihd", scores.softmax(dim=-1), v))
        return torch.cat(out)


class _Kernel(torch.autograd.Function):
    """Keeps inputs and lengths for backward, which computes the scores again."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        *how: Any,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, cu_seq_q, cu_seq_k)
        ctx.how = how
        kernel, scale, right = how
        return kernel.attend((query, key, value), (cu_seq_q, cu_seq_k), scale, right)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, cu_seq_q, cu_seq_k = ctx.saved_tensors
        kernel, scale, right = ctx.how
        with torch.enable_grad():
            inputs = tuple(x.detach().requires_grad_() for x in tensors)
            out = kernel.attend(inputs, (cu_seq_q, cu_seq_k), scale, right)
            found = torch.autograd.grad(out, inputs, grad)
        return *found, None, None, None, None, None
