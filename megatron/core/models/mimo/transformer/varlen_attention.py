# SPDX-License-Identifier: Apache-2.0
"""Attention of all segments of packed sequences in one call, where PyTorch has a kernel for it.

PyTorch's ``varlen_attn`` is FlashAttention over sequences laid end to end: CUDA and 16 bits only.
It gets cumulative lengths on the device, which are uploaded beside the host's work.

In a segment with fewer queries than keys the causal mask is to be aligned to the last key. PyTorch
does not document that of ``varlen_attn``; its ``CausalBias`` calls the same FlashAttention with the
same argument for ``causal_lower_right``. ``make gpu-check`` compares.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention

from megatron.core.models.mimo.partition.attention_segments import AttentionSegments
from megatron.core.models.mimo.uploads import upload

_HALVES = (torch.float16, torch.bfloat16)
# SDPA pads heads to a multiple of it before it calls FlashAttention; varlen_attn does not.
_WIDTH = 8


def varlen_kernel(query: Tensor, key: Tensor, value: Tensor) -> Callable[..., Any] | None:
    """Return PyTorch's ``varlen_attn`` where it attends to these tensors, else ``None``.

    Args:
        query: ``(t, 1, heads, d)``.
        key: ``(T, 1, groups, d)``.
        value: ``(T, 1, groups, d_v)``.
    """
    if not query.is_cuda or query.dtype not in _HALVES or query.size(1) != 1:
        return None
    if value.size(-1) != query.size(-1) or query.size(-1) % _WIDTH:
        return None
    # PyTorch knows what its kernel takes on this device, and whether it is switched off.
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    grouped = query.size(2) != key.size(2)
    if not can_use_flash_attention(SDPAParams(q, k, v, None, 0.0, False, grouped)):
        return None
    return _from_torch()


@functools.cache
def _from_torch() -> Callable[..., Any] | None:
    """PyTorch's, from the version on that takes windows and grouped queries; not ROCm's."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters.keys() >= {"window_size", "enable_gqa"}
    return varlen_attn if known and torch.version.hip is None else None


def attend_segments(
    kernel: Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: AttentionSegments,
    causal: bool,
    scale: float | None,
) -> Tensor:
    """Attend in one call of the kernel.

    Args:
        kernel: of :func:`varlen_kernel`.
        query: ``(t, 1, heads, d)``, the queries of all segments end to end.
        key: ``(T, 1, groups, d)``, their keys.
        value: ``(T, 1, groups, d)``, their values.
        segments: at least one.
        causal: whether a query sees only what is not after it.
        scale: of the scores; ``None`` means ``1 / sqrt(d)``.

    Returns:
        ``(t, 1, heads, d)``.
    """
    bounds = upload(torch.tensor(segments.bounds(), dtype=torch.int32), query.device)
    out = kernel(
        query.squeeze(1),
        key.squeeze(1),
        value.squeeze(1),
        bounds[0],
        bounds[1],
        max(segments.queries),
        max(segments.keys),
        scale=scale,
        window_size=(-1, 0) if causal else (-1, -1),
        enable_gqa=query.size(2) != key.size(2),
    )
    return out.unsqueeze(1)
