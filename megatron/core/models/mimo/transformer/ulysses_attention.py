# SPDX-License-Identifier: Apache-2.0
"""Attention of an encoder whose items are cut over a CP group: rows are exchanged for heads.

Each CP rank has a part of every item's sequence (:class:`ItemParts`). Around the attention one
all-to-all gives it whole sequences of ``1 / cp`` of the heads, and a second one its own positions
with all heads back, as in DeepSpeed-Ulysses. Backward runs the same two the other way. Items need
not divide by the ranks: the splits are uneven, and a rank may have no position at all. Nothing is
approximated: every head sees what it sees without a cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.core.models.mimo.partition.packed_lengths import end_to_end
from megatron.core.models.mimo.transformer.context_parallel_attention import (
    CAUSAL_TYPES,
    ContextParallelAttention,
)
from megatron.core.models.mimo.uploads import upload
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType


@dataclass(frozen=True)
class ItemParts:
    """How the sequences of some items (images) are cut over CP ranks, in contiguous parts.

    An encoder makes ``n`` rows of an item; CP rank ``c`` gets the positions of the rows from
    ``n * c // size`` to ``n * (c + 1) // size``, which is what the bridge takes it to hold.

    >>> parts = ItemParts((5, 4), size=2, lead=1)
    >>> parts.cuts.tolist(), parts.lengths_of(1)
    ([[0, 3, 5], [0, 2, 4]], [2, 2])

    Args:
        lengths: positions of each whole item.
        size: CP ranks.
        lead: first positions of each item that make no row (a class token); the first part's.
        unit: positions that make one row (merged patches), never cut apart.

    Raises:
        ValueError: an item that is no whole number of rows.
    """

    lengths: tuple[int, ...]
    size: int
    lead: int = 0
    unit: int = 1

    def __post_init__(self) -> None:
        odd = [n for n in self.lengths if n < self.lead or (n - self.lead) % self.unit]
        if odd:
            raise ValueError(
                f"An item of {odd[0]} positions, of which {self.lead} lead and {self.unit} make a "
                "row, is no whole number of rows"
            )

    @cached_property
    def cuts(self) -> np.ndarray:
        """Where each item's parts begin, and where the last one ends: ``(items, size + 1)``."""
        lengths = np.array(self.lengths, dtype=np.int64)[:, None]
        rows = (lengths - self.lead) // self.unit * np.arange(self.size + 1) // self.size
        cuts = self.lead + self.unit * rows
        cuts[:, 0] = 0
        return cuts

    @cached_property
    def _part_lengths(self) -> np.ndarray:
        return np.diff(self.cuts)

    @property
    def alike(self) -> bool:
        """Whether all items are equally long."""
        return len(set(self.lengths)) == 1

    def lengths_of(self, rank: int) -> list[int]:
        """Return the positions of each item that a CP rank has."""
        return self._part_lengths[:, rank].tolist()

    @cached_property
    def totals(self) -> list[int]:
        """Positions that each CP rank has, of all items."""
        return self._part_lengths.sum(axis=0).tolist()

    def cut(self, whole: Tensor, rank: int, pad_to: int = 1) -> Tensor:
        """Return a CP rank's positions of ``(t, ...)``, item after item: ``(t_local, ...)``.

        They are padded with zeros to a multiple of ``pad_to``, at least to one, since Megatron's
        layers take no empty batch.
        """
        ends = self.cuts[:, rank : rank + 2] + (np.cumsum(self.lengths) - self.lengths)[:, None]
        total = self.totals[rank]
        padding = max(-(-total // pad_to), 1) * pad_to - total
        pieces = [whole[start:stop] for start, stop in ends.tolist()]
        return torch.cat([*pieces, whole.new_zeros((padding, *whole.shape[1:]))])

    def rows(self, local: Tensor, rank: int) -> Tensor:
        """Return a CP rank's positions that make rows: no padding and no leading ones."""
        local = local[: self.totals[rank]]
        if rank or not self.lead:
            return local
        pieces = local.split(self.lengths_of(rank))
        return torch.cat([local[:0], *(piece[self.lead :] for piece in pieces)])

    def packed(self) -> PackedSeqParams:
        """Return what :class:`UlyssesAttention` reads: whole lengths, and how they are cut."""
        params = end_to_end(self.lengths)
        vars(params)["item_parts"] = self
        return params

    def run(
        self,
        layers: Callable[[Tensor, PackedSeqParams], Tensor],
        whole: Tensor,
        rank: int,
        pad_to: int,
    ) -> Tensor:
        """Run layers on a CP rank's part of every item; return the positions that make rows.

        Args:
            layers: ``(t_local, 1, h)`` and what their attention reads -> ``(t_local, 1, H)``.
            whole: ``(t, h)``, item after item.
            rank, pad_to: as for :meth:`cut`.
        """
        local = self.cut(whole, rank, pad_to).unsqueeze(1)
        return self.rows(layers(local, self.packed()).squeeze(1), rank)

    def order(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return where positions of whole items come from in ranks' parts end to end, and back."""
        known: dict[torch.device, tuple[Tensor, Tensor]] = vars(self).setdefault("_orders", {})
        if device not in known:
            # Of each (item, part): its place among the parts of its rank, ranks end to end.
            lengths = self._part_lengths
            first = (np.cumsum(lengths.T.reshape(-1)) - lengths.T.reshape(-1)).reshape(
                self.size, -1
            )
            starts, counts = first.T.reshape(-1), lengths.reshape(-1)
            within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
            there = np.repeat(starts, counts) + within
            both = upload(torch.from_numpy(np.stack([there, np.argsort(there)])), device)
            known[device] = both[0], both[1]
        return known[device]


class UlyssesAttention(ContextParallelAttention):
    """Scaled dot-product attention of items that are cut over a CP group, by heads.

    A drop-in for ``core_attention``, as its base class. Packed batches only, whose lengths are
    those of whole items: ``packed_seq_params`` are made by :meth:`ItemParts.packed`. Dropout draws
    by heads, so CP ranks draw different masks where their random states differ.

    Args:
        config, layer_number, attn_mask_type, attention_type: as of the base class.
        more: as of the base class.

    Raises:
        ValueError: heads or query groups that do not divide by ``tp * cp``; as the base class.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        **more: Any,
    ) -> None:
        super().__init__(config, layer_number, attn_mask_type, attention_type, **more)
        parts = config.tensor_model_parallel_size * config.context_parallel_size
        for name in ("num_attention_heads", "num_query_groups"):
            if getattr(config, name) % parts:
                raise ValueError(
                    f"{name} ({getattr(config, name)}) must divide by tp * cp = "
                    f"{config.tensor_model_parallel_size} * {config.context_parallel_size} of an "
                    "encoder whose attention shares out its heads over CP; use a smaller tp or cp"
                )

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
            query: ``(t, heads, d)`` or ``(t, 1, heads, d)``, this rank's positions of all items,
                item after item; further ones at the end are padding and yield zeros.
            key, value: the same with ``groups`` heads.
            attention_mask, attention_bias: must be None.
            attn_mask_type: None takes the layer's own.
            packed_seq_params: of :meth:`ItemParts.packed`.

        Returns:
            ``(t, heads * d)``, or ``(t, 1, heads * d)``.

        Raises:
            ValueError: a mask or bias; no parts, or parts of another number of ranks or positions.
        """
        if attention_mask is not None or attention_bias is not None:
            raise ValueError("attention_mask and attention_bias must be None where items are cut")
        group: Any = self.cp_group
        parts = self._parts_of(packed_seq_params, query.size(0))
        batched = query.dim() == 4
        own = parts.totals[group.rank()]
        q, k, v = (x.flatten(0, -3)[:own] for x in (query, key, value))
        whole = _whole_items((q, k, v), parts, group)
        causal = (attn_mask_type or self.attn_mask_type) in CAUSAL_TYPES
        if parts.alike:
            shape = len(parts.lengths), parts.lengths[0]
            q, k, v = (x.unflatten(0, shape).transpose(0, 1) for x in whole)
            out = self._attend(q, k, v, causal).transpose(0, 1).flatten(0, 1).flatten(-2)
        else:
            lengths = list(parts.lengths)
            q, k, v = (x.unsqueeze(1) for x in whole)
            out = self._attend_sequences(q, k, v, causal, (lengths, lengths), None).squeeze(1)
        local = _own_positions(out, parts, group)
        padding = query.size(0) - own
        if padding:
            local = torch.cat([local, local.new_zeros((padding, local.size(-1)))])
        return local.unsqueeze(1) if batched else local

    def _parts_of(self, packed: PackedSeqParams | None, positions: int) -> ItemParts:
        parts: ItemParts | None = getattr(packed, "item_parts", None)
        group: Any = self.cp_group
        if parts is None or parts.size != group.size():
            found = "none" if parts is None else f"parts for {parts.size} ranks"
            raise ValueError(
                f"Attention of items that are cut over {group.size()} CP ranks needs "
                f"packed_seq_params of ItemParts(lengths, {group.size()}).packed(), got {found}"
            )
        own = parts.totals[group.rank()]
        if positions < own:
            raise ValueError(
                f"This rank brings {positions} positions; its parts of items of "
                f"{list(parts.lengths)} positions are {own}"
            )
        return parts


def _whole_items(qkv: Sequence[Tensor], parts: ItemParts, group: Any) -> list[Tensor]:
    """Own positions ``(t, heads, d)`` of three -> whole items ``(T, heads / cp, d)``, in one go."""
    size, own = group.size(), qkv[0].size(0)
    # Of each receiver its heads of queries, keys and values. A rank may have no position.
    blocks = [x.reshape(own, size, x.size(1) * x.size(2) // size) for x in qkv]
    sent = torch.cat(blocks, dim=-1).transpose(0, 1).flatten(0, 1)
    received = _Exchange.apply(sent, [own] * size, parts.totals, group)
    there, back = parts.order(sent.device)
    whole = _Reorder.apply(received, there, back)
    widths = [block.size(-1) for block in blocks]
    shapes = [(x.size(1) // size, x.size(2)) for x in qkv]
    pieces = zip(whole.split(widths, dim=-1), shapes, strict=True)
    return [piece.unflatten(-1, shape) for piece, shape in pieces]


def _own_positions(out: Tensor, parts: ItemParts, group: Any) -> Tensor:
    """The reverse for the output: ``(T, width / cp)`` -> ``(t, width)``."""
    size, own = group.size(), parts.totals[group.rank()]
    there, back = parts.order(out.device)
    sent = _Reorder.apply(out, back, there)
    received = _Exchange.apply(sent, parts.totals, [own] * size, group)
    return received.view(size, own, out.size(1)).transpose(0, 1).flatten(1)


class _Exchange(torch.autograd.Function):
    """All-to-all along dim 0: ``x`` is cut by receiver, ``y`` is by sender, in group order.

    Gradient: the same exchange with the splits swapped. A row goes to one rank only, so nothing is
    summed.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.splits, ctx.group = (sent, received), group
        return _all_to_all(x, sent, received, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        sent, received = ctx.splits
        return _all_to_all(dy, received, sent, ctx.group), None, None, None


class _Reorder(torch.autograd.Function):
    """Rows in another order; the gradient is copied back, where an index would sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.back = back
        return x.index_select(0, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return dy.index_select(0, ctx.back), None, None


def _all_to_all(x: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
    out = x.new_empty((sum(received), *x.shape[1:]))
    dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
    return out
