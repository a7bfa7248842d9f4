# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters on Megatron's column- and row-parallel layers, cut over TP with them.

Of a layer ``y = W x`` a part of the outputs gets ``scale * B A x`` besides: all of them, or those
of one of the projections that the layer joins. What follows is the same function on any number of
TP ranks; ``t`` ranks, ``s`` tokens, ``r`` the adapter's rank:

=======  ===================  ===================  ==============================================
layer    A                    B                    between the two, ``h = A x``: ``(s, r)``
=======  ===================  ===================  ==============================================
column   whole ``(r, in)``    ``(out / t, r)``     gradients of h are summed over TP; with a cut
                                                   sequence h is gathered, not x
row      ``(r, in / t)``      whole ``(out, r)``   h is summed over TP, and scattered with a cut
                                                   sequence
=======  ===================  ===================  ==============================================

So nothing that is wider than ``r`` is sent for an adapter. With a cut sequence what is whole sees a
part of the tokens on each rank: its gradient is summed over TP with that of norms.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear

from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    get_cuda_rng_tracker,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

ADAPTERS = "lora"
"""Name of a layer's adapters among its modules."""


class Adapter(nn.Module):
    """One low-rank change of a layer's outputs, of which it holds what the layer's rank has.

    Args:
        layer: column- or row-parallel.
        rank: of the change.
        scale: that multiplies it.
        drop: probability with which an input is dropped, in training.
        rows: of the layer's outputs on this rank, those that it changes; None for all.

    Attributes:
        A: ``(rank, in)`` or, of a row-parallel layer, this rank's part of ``in``.
        B: ``(out, rank)``, of a column-parallel layer this rank's part of ``out``; begins with
            zeros.
    """

    def __init__(
        self,
        layer: Any,
        rank: int,
        scale: float,
        drop: float = 0.0,
        rows: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        weight = layer.weight
        self.column = isinstance(layer, ColumnParallelLinear)
        self.scale, self.drop = scale, drop
        self.group, self.sequence_parallel = layer.tp_group, layer.sequence_parallel
        out = weight.shape[0] if rows is None else len(rows)
        self.A = nn.Parameter(weight.new_zeros(rank, weight.shape[1]))
        self.B = nn.Parameter(weight.new_zeros(out, rank))
        at = None if rows is None else torch.tensor(rows, device=weight.device)
        self.register_buffer("rows", at, persistent=False)
        cut, whole = (self.B, self.A) if self.column else (self.A, self.B)
        set_tensor_model_parallel_attributes(cut, True, 0 if self.column else 1, 1)
        whole.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]

    @property
    def cuts(self) -> dict[str, int]:
        """Name of the parameter that TP cuts -> the dim."""
        return {"B": 0} if self.column else {"A": 1}

    def forward(self, x: Tensor) -> Tensor:
        """Return the change ``(..., out)``, as the layer returns its own output."""
        hidden = self._over_tp(linear(self._dropped(x), self.A))
        return linear(hidden * self.scale, self.B)

    def _over_tp(self, hidden: Tensor) -> Tensor:
        if self.column:
            if self.sequence_parallel:
                return gather_from_sequence_parallel_region(hidden, group=self.group)
            return copy_to_tensor_model_parallel_region(hidden, group=self.group)
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(hidden, group=self.group)
        return reduce_from_tensor_model_parallel_region(hidden, group=self.group)

    def _dropped(self, x: Tensor) -> Tensor:
        if not (self.drop and self.training):
            return x
        # TP ranks see other features of a row-parallel input, and draw for themselves.
        own = not self.column and not self.sequence_parallel
        with get_cuda_rng_tracker().fork() if own else contextlib.nullcontext():
            return dropout(x, self.drop)

    @torch.no_grad()
    def change(self) -> Tensor:
        """Return what merging adds to this rank's rows of the weight, in fp32."""
        return (self.B.float() @ self.A.float()) * self.scale


class _Adapted:
    """What a layer with adapters does besides."""

    def forward(self, input_: Tensor, *more: Any, **named: Any) -> tuple[Tensor, Tensor | None]:
        """Return the layer's output, changed, and its bias."""
        output, bias = super().forward(input_, *more, **named)  # type: ignore[misc]
        for adapter in adapters_of(self).values():
            change = adapter(input_).to(output.dtype)
            if adapter.rows is None:
                output = output + change
            else:
                output = output.index_add(-1, adapter.rows, change)
        return output, bias

    def sharded_state_dict(
        self: Any, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """Return the layer's sharded state with that of its adapters, cut as they are."""
        state = super().sharded_state_dict(  # type: ignore[misc]
            prefix, sharded_offsets, metadata
        )
        for name, adapter in adapters_of(self).items():
            state |= make_sharded_tensors_for_checkpoint(
                adapter.state_dict(prefix="", keep_vars=True),
                f"{prefix}{ADAPTERS}.{name}.",
                adapter.cuts,
                sharded_offsets,
                tp_group=self.tp_group,
                dp_cp_group=metadata["dp_cp_group"],
            )
        return state


@functools.cache
def _adapted(kind: type) -> type:
    return type(f"Adapted{kind.__name__}", (_Adapted, kind), {})


def can_adapt(layer: nn.Module) -> bool:
    """Return whether a layer is one that takes adapters: not fused with others, no expert's."""
    if isinstance(layer, ColumnParallelLinear):
        whole = layer.gather_output
    elif isinstance(layer, RowParallelLinear):
        whole = not layer.input_is_parallel
    else:
        return False
    return not (whole or layer.is_expert)


def adapt(layer: Any, adapters: Mapping[str, Adapter]) -> None:
    """Give a layer adapters; its own parameters keep their names.

    Args:
        layer: for which :func:`can_adapt` is true.
        adapters: their names, for checkpoints.
    """
    layer.add_module(ADAPTERS, nn.ModuleDict(adapters))
    layer.__class__ = _adapted(type(layer))


def adapters_of(layer: Any) -> dict[str, Adapter]:
    """Return name -> adapter of a layer; none of one that has none."""
    found: Any = layer._modules.get(ADAPTERS)
    return {} if found is None or not isinstance(layer, _Adapted) else dict(found.items())


def is_adapters(name: str) -> bool:
    """Return whether a parameter's name is that of an adapter's."""
    return f".{ADAPTERS}." in name


@torch.no_grad()
def merge(layer: Any) -> None:
    """Add what a layer's adapters change to its weight; they stay as they are."""
    for adapter in adapters_of(layer).values():
        rows = slice(None) if adapter.rows is None else adapter.rows
        weight = layer.weight
        weight[rows] = (weight[rows].float() + adapter.change()).to(weight.dtype)


def take_off(layer: Any) -> None:
    """Take a layer's adapters off."""
    del layer._modules[ADAPTERS]
    layer.__class__ = type(layer).__mro__[2]
