# SPDX-License-Identifier: Apache-2.0
"""Context-parallel core attention on PyTorch's ``scaled_dot_product_attention``.

Every CP rank holds chunks ``r`` and ``2 * cp - 1 - r`` of the sequence ("zigzag"). The queries
stay where they are. Keys and values are gathered once per layer over the CP group, and laid out as
segments: for each of the two local query chunks the prefix of keys that it may see, end to end.
Packed sequences are attended to in one call where PyTorch has a kernel for all segments
(:mod:`.varlen_attention`), else in one call per segment. Until backward a rank keeps its own keys
and values alone. Forward: one all-gather. Backward: the same all-gather and one reduce-scatter.
Nothing is approximated: the result is the unsharded attention, up to the order of floating-point
sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import chain
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.bias import causal_lower_right
from torch.utils._python_dispatch import _disable_current_modes

from megatron.core import parallel_state
from megatron.core.models.mimo.partition.attention_segments import (
    AttentionSegments,
    attention_segments,
)
from megatron.core.models.mimo.partition.packed_lengths import packed_lengths
from megatron.core.models.mimo.transformer.gathered_keys import GatheredKeys
from megatron.core.models.mimo.transformer.varlen_attention import attend_segments, varlen_kernel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

CAUSAL_TYPES = (
    AttnMaskType.causal,
    AttnMaskType.padding_causal,
    AttnMaskType.causal_bottom_right,
)

# torch 2.13 renames both collectives and warns about the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class ContextParallelAttention(MegatronModule):
    """Scaled dot-product attention over a sequence that is sharded over a CP group.

    A drop-in for ``core_attention`` in Megatron-Core's self-attention submodules, with and
    without CP, for causal and bidirectional layers, grouped queries, and packed sequences.

    Args:
        config: the layer's config. ``context_parallel_size`` and ``attention_dropout`` count.
        layer_number: accepted for the interface. ``apply_query_key_layer_scaling`` divides and
            multiplies the scores by it to stay inside fp16, which this attention does not need.
        attn_mask_type: used where ``forward`` is not told another one.
        attention_type: anything but "self" is for CP 1.
        attention_dropout: probability; None takes the config's.
        softmax_scale: None means 1 / sqrt(head dim).
        cp_comm_type: accepted for the interface; K and V are always gathered.
        pg_collection: its ``cp`` is the CP group. Megatron's global state is asked only if
            there is none and the config says CP > 1.
        unused: what other Megatron-Core versions and MLA pass to their own attention classes
            (``k_channels``, ``v_channels``, …); shapes are read from the tensors instead.

    Raises:
        ValueError: the group's size is not the config's, or the config asks for a feature that
            changes the result and is not here (attention sink, window, QK clipping).
    """

    takes_host_lengths = True
    """Whether it reads cumulative lengths on the host; where they are on the device it waits."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | list[str] | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        _refuse_unsupported(config)
        if attention_type != "self" and config.context_parallel_size > 1:
            raise ValueError(
                f"ContextParallelAttention shards self-attention only, got {attention_type!r} with "
                f"context_parallel_size {config.context_parallel_size}; use CP 1 for such layers"
            )
        self.layer_number = max(1, layer_number)
        self.attn_mask_type = attn_mask_type
        self.attention_type = attention_type
        self.softmax_scale = softmax_scale
        self.dropout_p = (
            config.attention_dropout if attention_dropout is None else attention_dropout
        )
        self.cp_group = _resolve_cp_group(config, pg_collection)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **unused: Any,
    ) -> Tensor:
        """Attend.

        Args:
            query: ``(s, b, heads, d)``, or ``(t, heads, d)`` packed; s and t are CP-local.
            key: the same with ``groups`` heads, ``heads % groups == 0``.
            value: the same with ``groups`` heads; its head dim may differ.
            attention_mask: bool, True where attention is forbidden, broadcastable to
                ``(b, heads, s, s)``. Without CP only. As in stock's local attention it *replaces*
                the causal mask. A query that may see nothing yields zeros.
            attn_mask_type: None takes the layer's own.
            attention_bias: must be None.
            packed_seq_params: ``thd`` boundaries, *global*: of the sequences before CP cut
                them. Padding at the end of a sequence yields zeros and receives no attention.

        Returns:
            ``(s, b, heads * d)``, or ``(t, heads * d)`` packed.

        Raises:
            ValueError: a bias, a mask that is not bool or comes with CP or packing, or a local
                length that does not fit CP or ``cu_seqlens``.
        """
        if attention_bias is not None:
            raise ValueError("attention_bias is not supported by ContextParallelAttention")
        causal = (attn_mask_type or self.attn_mask_type) in CAUSAL_TYPES
        packed = packed_seq_params is not None and packed_seq_params.qkv_format == "thd"
        group = self._group_of(packed_seq_params)
        if attention_mask is not None:
            _refuse_mask(attention_mask, packed, group)
            return self._attend_masked(query, key, value, attention_mask).flatten(-2)
        if not packed:
            whole = [query.size(0) * _size(group)]
            return self._attend_sequences(query, key, value, causal, (whole, whole), group, False)
        lengths = packed_lengths(cast(PackedSeqParams, packed_seq_params))
        query, key, value = (x.unsqueeze(1) if x.dim() == 3 else x for x in (query, key, value))
        return self._attend_sequences(query, key, value, causal, lengths, group).squeeze(1)

    def _group_of(self, packed: PackedSeqParams | None) -> dist.ProcessGroup | None:
        """The CP group of this call: a packed batch may bring its own (stock's hybrid CP)."""
        own = getattr(packed, "cp_group", None)
        return self.cp_group if own is None else own

    def _attend_sequences(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        causal: bool,
        lengths: tuple[Sequence[int], Sequence[int]],
        group: dist.ProcessGroup | None,
        packed: bool = True,
    ) -> Tensor:
        """Attention within each of the sequences that are laid end to end along dim 0.

        Args:
            query: ``(t, b, heads, d)``, CP-local.
            key: ``(t, b, groups, d)``, CP-local.
            value: ``(t, b, groups, d_v)``, CP-local.
            causal: whether a query sees only what is not after it.
            lengths: global length of each sequence, padding included, and without its trailing
                padding.
            group: the CP group, or None.
            packed: whether :func:`.varlen_kernel` may attend to all of it.

        Returns:
            ``(t, b, heads * d_v)``, CP-local.
        """
        padded, real = map(tuple, lengths)
        if _size(group) == 1 and query.size(0) != key.size(0) and len(padded) == 1:
            # A cache of earlier keys (stock's static inference): bottom-right causal.
            return self._attend(query, key, value, causal).flatten(-2)
        segments = attention_segments(padded, real, _rank(group), _size(group), causal)
        _check_local_length(sum(segments.rows), query, key, _size(group))
        query, kept = _real_rows(query, segments.rows), None
        if _size(group) == 1:
            key, value = (_real_rows(x, segments.rows) for x in (key, value))
        else:
            # K and V travel in one collective.
            local = torch.cat([key, value], dim=-1)
            gather = partial(_segment_keys, segments=segments, group=group)
            both = gather(local)
            kept = GatheredKeys(both, gather, local)
            key, value = both.split([key.size(-1), value.size(-1)], dim=-1)
        with kept.leaving_out() if kept else nullcontext():
            out = self._attend_segments(query, key, value, causal, segments, packed)
        joined = _with_padding(out, segments.rows).flatten(-2)
        return kept.before_backward(joined) if kept else joined

    def _attend_segments(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        causal: bool,
        segments: AttentionSegments,
        packed: bool,
    ) -> Tensor:
        """Attention within each segment: one call where PyTorch has one for them, else one each.

        Only real queries are computed, and they meet only real keys.
        """
        if not segments.queries:
            return _empty_rows(query, value)
        if packed and len(segments.queries) > 1 and self._dropout_now() == 0.0:
            kernel = varlen_kernel(query, key, value)
            if kernel is not None:
                scale = self.softmax_scale
                return attend_segments(kernel, query, key, value, segments, causal, scale)
        queries = query.split(segments.queries)
        keys, values = (x.split(segments.keys) for x in (key, value))
        parts = zip(queries, keys, values, strict=True)
        return torch.cat([self._attend(q, k, v, causal) for q, k, v in parts])

    def _attend_masked(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """As :meth:`_attend`, where the mask says all; queries that see nothing yield zeros.

        What a softmax over no key gives differs between PyTorch's kernels, so such queries see
        every key and their rows are replaced: neither they nor their gradients go anywhere.
        """
        allowed = ~mask.to(query.device)
        blind = ~allowed.any(dim=-1, keepdim=True)
        out = self._attend(query, key, value, False, bias=allowed | blind)
        return out.permute(1, 2, 0, 3).masked_fill(blind, 0.0).permute(2, 0, 1, 3)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, causal: bool, bias: Tensor | None = None
    ) -> Tensor:
        """``(sq, b, heads, d)`` x ``(sk, b, groups, d)`` -> ``(sq, b, heads, d_v)``.

        Causal means aligned to the last key: query ``i`` of ``sq`` sees ``sk - sq + i + 1`` keys.
        A ``bias`` is True where a query may see a key.
        """
        query_shape = (*query.shape[:-1], value.size(-1))
        is_causal = False
        if bias is None:
            query, key, value = _by_groups(query, key, value)
            bias, is_causal = _mask_arguments(query.size(0), key.size(0), causal)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        dropout_p = self._dropout_now()
        with self._dropout_rng(dropout_p):
            out = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=bias,
                dropout_p=dropout_p,
                is_causal=is_causal,
                scale=self.softmax_scale,
                enable_gqa=q.size(1) != k.size(1),
            )
        return out.permute(2, 0, 1, 3).reshape(query_shape)

    def _dropout_now(self) -> float:
        return self.dropout_p if self.training else 0.0

    def _dropout_rng(self, dropout_p: float) -> AbstractContextManager[Any]:
        """TP ranks hold different heads, so dropout draws from the TP-specific RNG state.

        With sequence parallelism the transformer block has forked it already.
        """
        if dropout_p == 0.0 or self.config.sequence_parallel:
            return nullcontext()
        return get_cuda_rng_tracker().fork()


class _GatherSequence(torch.autograd.Function):
    """All-gather along dim 0 over a group; the gradient is reduce-scattered.

    Shapes: x ``(t, …)``, different on each rank; y ``(n * t, …)``, the same on all.
    Forward: ``y = cat(x_0, …, x_{n-1})``, in group order.
    Gradient: ``dx_r = sum over ranks q of dy_q[r * t : (r + 1) * t]``. Every rank uses y for
    its own queries only, so its dy is a partial one; narrowing without the sum would lose what
    the other ranks' queries asked of this rank's keys.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        """Gather; ``x`` is made contiguous first."""
        ctx.group = group
        out = x.new_empty((group.size() * x.size(0), *x.shape[1:]))
        _all_gather(out, x.contiguous(), group=group)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Sum over the group, keep this rank's rows."""
        out = grad.new_empty((grad.size(0) // ctx.group.size(), *grad.shape[1:]))
        _reduce_scatter(out, grad.contiguous(), group=ctx.group)
        return out, None


def _segment_keys(both: Tensor, *, segments: AttentionSegments, group: Any) -> Tensor:
    """Keys and values of the segments end to end, from the CP-local tokens; a collective.

    Pieces are taken with ``split`` and joined with ``cat``: their gradients are copies, and sums in
    one order where a piece is in several segments. An index would need atomic ones.
    """
    gathered = _GatherSequence.apply(both, group)
    pieces = gathered.split(segments.gathered)[::2]
    return torch.cat([gathered[:0], *(pieces[i] for i in segments.pieces)])


def _real_rows(x: Tensor, turns: Sequence[int]) -> Tensor:
    """The rows of ``x`` that are not padding; ``turns`` are counts of real and padding ones."""
    return torch.cat(x.split(turns)[::2]) if any(turns[1::2]) else x


def _with_padding(x: Tensor, turns: Sequence[int]) -> Tensor:
    """The reverse of :func:`_real_rows`; padding is zeros."""
    if not any(turns[1::2]):
        return x
    zeros = x.new_zeros((sum(turns[1::2]), *x.shape[1:])).split(turns[1::2])
    return torch.cat([*chain.from_iterable(zip(x.split(turns[::2]), zeros, strict=True))])


def _mask_arguments(q_len: int, k_len: int, causal: bool) -> tuple[Tensor | None, bool]:
    """``(attn_mask, is_causal)`` for SDPA, whose own ``is_causal`` aligns to the *first* key."""
    if not causal or q_len == 1:
        return None, False
    if q_len == k_len:
        return None, True
    # PyTorch cannot make one while a dispatch mode, such as its counter of FLOPs, is on.
    with _disable_current_modes():
        return causal_lower_right(q_len, k_len), False


def _by_groups(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Grouped queries as if each group of heads were a sample of its own.

    ``(sq, b, heads, d)``, ``(sk, b, groups, d)`` -> ``(sq, b * groups, heads / groups, d)`` and
    views ``(sk, b * groups, heads / groups, d)``. Of PyTorch's kernels only one takes groups, and
    that one not every dtype; what is left to it repeats keys and values, and writes out all scores.
    """
    groups = key.size(2)
    if query.size(2) == groups:
        return query, key, value
    query = query.reshape(query.size(0), -1, query.size(2) // groups, query.size(3))
    key, value = (
        x.reshape(x.size(0), -1, 1, x.size(3)).expand(-1, -1, query.size(2), -1)
        for x in (key, value)
    )
    return query, key, value


def _empty_rows(query: Tensor, value: Tensor) -> Tensor:
    """``(0, b, heads, d_v)`` rows that depend on both in the autograd graph.

    A rank that holds nothing but padding still has to enter the backward collective of its CP
    group, and DDP waits for every gradient. ``value`` is a view of what was gathered, so the keys
    hang on it too.
    """
    repeat = query.size(2) // value.size(2)
    return value[:0].repeat_interleave(repeat, dim=2) + query[:0, ..., :1]


def _size(group: dist.ProcessGroup | None) -> int:
    return 1 if group is None else group.size()


def _rank(group: dist.ProcessGroup | None) -> int:
    return 0 if group is None else group.rank()


def _resolve_cp_group(
    config: TransformerConfig, pg_collection: ProcessGroupCollection | None
) -> dist.ProcessGroup | None:
    """The given CP group, else Megatron's global one, else None for CP 1."""
    group = getattr(pg_collection, "cp", None)
    if group is None and config.context_parallel_size > 1:
        group = parallel_state.get_context_parallel_group()
    if _size(group) != config.context_parallel_size:
        raise ValueError(
            f"config.context_parallel_size is {config.context_parallel_size}, but the CP process "
            f"group has {_size(group)} ranks; give the module the grid's own 'cp' group and set "
            f"context_parallel_size to its size"
        )
    return group


def _refuse_mask(mask: Tensor, packed: bool, group: dist.ProcessGroup | None) -> None:
    if mask.dtype != torch.bool:
        raise ValueError(
            f"attention_mask must be bool, True where attention is forbidden, got {mask.dtype}"
        )
    if packed:
        raise ValueError("attention_mask must be None with packed sequences: cu_seqlens says it")
    if _size(group) > 1:
        raise ValueError(
            f"attention_mask must be None with context parallelism (CP {_size(group)}): a rank "
            f"holds only its own chunks; use a causal or packed layout"
        )


def _check_local_length(expected: int, query: Tensor, key: Tensor, cp_size: int) -> None:
    if query.size(0) != expected or key.size(0) != expected:
        raise ValueError(
            f"This rank holds {query.size(0)} query and {key.size(0)} key tokens, but the "
            f"sequence lengths at CP {cp_size} say {expected}"
        )


def _refuse_unsupported(config: TransformerConfig) -> None:
    """Features that change the result are refused rather than ignored."""
    wanted = {
        "softmax_type": getattr(config, "softmax_type", "vanilla") != "vanilla",
        "window_size": getattr(config, "window_size", None) is not None,
        "qk_clip": bool(getattr(config, "qk_clip", False)),
        "log_max_attention_logit": bool(getattr(config, "log_max_attention_logit", False)),
    }
    for name, asked in wanted.items():
        if asked:
            raise ValueError(
                f"ContextParallelAttention does not support {name}={getattr(config, name)!r}; "
                f"leave it at its default or use Transformer Engine's attention"
            )
