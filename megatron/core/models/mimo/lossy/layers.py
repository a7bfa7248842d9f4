# SPDX-License-Identifier: Apache-2.0
"""Megatron's column- and row-parallel layers with links that lose packets.

A layer is changed by attributes of its own, which hide its class's methods and are deleted again.
Its arithmetic stays Megatron's; the collective alone is called here instead of inside.

Not covered, and without loss: the vocabulary-parallel embedding, the loss, gathered outputs,
experts. Transformer Engine's layers are refused: their collectives are in its kernels. Under SP a
column-parallel layer keeps its gathered input for the weight's gradient, where Megatron gathers it
again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from megatron.core.models.mimo.lossy.collectives import (
    apply,
    gather,
    identity,
    scatter_total,
    total,
)
from megatron.core.models.mimo.lossy.place import Place
from megatron.core.models.mimo.lossy.spec import (
    BACKWARD,
    FORWARD,
    GATHER,
    REDUCE_SCATTER,
    SUM,
)
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

Where = tuple[str, str]
Remove = Callable[[], None]


def places_of(layer: Any) -> list[Where]:
    """Return (direction, collective) of what a layer sends; none for other modules."""
    if isinstance(layer, RowParallelLinear) and not layer.explicit_expert_comm:
        if layer.sequence_parallel:
            return [(FORWARD, REDUCE_SCATTER), (BACKWARD, GATHER)]
        return [(FORWARD, SUM)]
    if isinstance(layer, ColumnParallelLinear) and not layer.explicit_expert_comm:
        if layer.sequence_parallel:
            return [(FORWARD, GATHER), (BACKWARD, REDUCE_SCATTER)]
        return [] if layer.disable_grad_reduce else [(BACKWARD, SUM)]
    if _sends_within_a_kernel(layer):
        return [(FORWARD, SUM), (BACKWARD, SUM)]  # somewhere: check_layer refuses it
    return []


def _sends_within_a_kernel(layer: Any) -> bool:
    """Whether it is a layer of Transformer Engine that is cut over TP."""
    kinds = {kind.__module__.partition(".")[0] for kind in type(layer).__mro__}
    mode, tp_size = getattr(layer, "parallel_mode", None), getattr(layer, "tp_size", 1)
    return "transformer_engine" in kinds and bool(mode) and tp_size > 1


def check_layer(name: str, layer: Any) -> None:
    """Refuse a layer whose collectives cannot be taken out of it.

    Raises:
        ValueError: it is Transformer Engine's; it defers gradients of its weight; it has lossy
            links already.
    """
    if _sends_within_a_kernel(layer):
        raise ValueError(
            f"{name} is a layer of Transformer Engine, whose collectives are inside its kernels; "
            "set MIMO_LAYERS=local in the environment for Megatron's own layers, or name other "
            "layers in the rules"
        )
    deferring = getattr(layer.config, "defer_embedding_wgrad_compute", False)
    if deferring and isinstance(layer, ColumnParallelLinear):
        raise ValueError(
            f"{name} defers its weight's gradients (defer_embedding_wgrad_compute), which needs "
            "the input that Megatron gathers; switch that off, or leave the layer out of the rules"
        )
    if {"forward", "_forward_impl"} & vars(layer).keys():
        raise ValueError(
            f"{name} has lossy links already, or a forward of its own; remove() the first ones"
        )


def change_layer(layer: Any, places: dict[Where, Place]) -> Remove:
    """Make a layer send over the links of its places; returns what undoes it."""
    if isinstance(layer, RowParallelLinear):
        layer.forward = partial(_row, layer, layer.forward, places)
        return partial(delattr, layer, "forward")
    layer._forward_impl = partial(_column, layer, layer._forward_impl, places)
    return partial(delattr, layer, "_forward_impl")


def _row(layer: Any, stock: Any, places: dict[Where, Place], input_: torch.Tensor) -> Any:
    """The layer's forward: what Megatron multiplies, summed here, then the bias."""
    found = layer.explicit_expert_comm, layer.skip_bias_add
    # With these two Megatron leaves the sum and the bias to others.
    layer.explicit_expert_comm = layer.skip_bias_add = True
    try:
        own, _ = stock(input_)
    finally:
        layer.explicit_expert_comm, layer.skip_bias_add = found
    group = layer.tp_group
    if layer.sequence_parallel:
        there = partial(scatter_total, group=group, place=places.get((FORWARD, REDUCE_SCATTER)))
        back = partial(gather, group=group, place=places.get((BACKWARD, GATHER)))
    else:
        there, back = partial(total, group=group, place=places.get((FORWARD, SUM))), identity
    output = apply(own, there, back)
    if layer.skip_bias_add:
        return output, layer.bias
    return (output if layer.bias is None else output + layer.bias), None


def _column(
    layer: Any,
    stock: Any,
    places: dict[Where, Place],
    input: torch.Tensor,
    weight: torch.Tensor,
    **options: Any,
) -> torch.Tensor:
    """The layer's product; the collectives on its input and the input's gradient are made here."""
    group = layer.tp_group
    if options["sequence_parallel"]:
        there = partial(gather, group=group, place=places.get((FORWARD, GATHER)))
        back = partial(scatter_total, group=group, place=places.get((BACKWARD, REDUCE_SCATTER)))
        input = apply(input, there, back)
    elif options["allreduce_dgrad"]:
        back = partial(total, group=group, place=places.get((BACKWARD, SUM)))
        input = apply(input, identity, back)
    return stock(input, weight, **{**options, "sequence_parallel": False, "allreduce_dgrad": False})
