# SPDX-License-Identifier: Apache-2.0
"""A language replica without samples, as at the tail of an epoch, takes part like any other.

Stock's layers cannot shape zero samples, and every other rank waits for this replica's collectives:
its share of context parallelism, experts, pipeline stages and gradients. So it runs padding, one
text token over and over, and nothing of that comes out: the output is cut back to no samples, so
its loss is a sum over nothing and each gradient a zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from megatron.core.models.mimo.model.base import MimoModel

_LIKE_INPUT_IDS = ("labels", "loss_mask")


def without_items(modality_inputs: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Return ``modality_inputs``, ``None`` for each modality all of whose tensors are empty."""
    if not modality_inputs:
        return modality_inputs
    return {name: None if _is_empty(each) else each for name, each in modality_inputs.items()}


def _is_empty(inputs: Any) -> bool:
    encoders = inputs.values() if isinstance(inputs, Mapping) else ()
    tensors = [
        value
        for arguments in encoders
        if isinstance(arguments, Mapping)
        for value in arguments.values()
        if isinstance(value, torch.Tensor)
    ]
    return bool(tensors) and all(tensor.dim() and tensor.size(0) == 0 for tensor in tensors)


def padded_shape(model: MimoModel, input_ids: torch.Tensor) -> tuple[int, int]:
    """Return ``(1, S)`` for ``(0, S)``; without a length the shortest one that can be cut."""
    adapter, shortest = model.partition_adapter, 1
    if adapter is not None:
        config = model.config
        shortest = 2 * config.context_parallel_size * config.tensor_model_parallel_size
    return 1, input_ids.size(1) or shortest


def padding_for(
    model: MimoModel, batch: Mapping[str, Any], shape: tuple[int, ...]
) -> dict[str, Any]:
    """Return a batch of padding in the place of one without samples.

    Args:
        model: the whole model.
        batch: ``forward``'s keyword arguments, ``input_ids`` without elements.
        shape: of the padding's ``input_ids``.
    """
    ids = batch["input_ids"]
    special = set(model.special_token_ids.values())
    text = next(number for number in count() if number not in special)
    made = {**batch, "input_ids": ids.new_full(shape, text)}
    for name in _LIKE_INPUT_IDS:
        if batch.get(name) is not None:
            made[name] = batch[name].new_zeros(shape)
    positions = batch.get("position_ids")
    if positions is not None:
        counted = torch.arange(shape[1], dtype=positions.dtype, device=positions.device)
        made["position_ids"] = counted.expand(*positions.shape[:-2], *shape)
    if batch.get("packing_kwargs") is not None:
        ends = torch.tensor([0, shape[1]], dtype=torch.int32)
        made["packing_kwargs"] = {"cu_seqlens_q": ends, "cu_seqlens_kv": ends}
    mask = batch.get("attention_mask")
    if mask is not None and mask.numel() == 0:
        made["attention_mask"] = None
    if batch.get("route_plan"):
        made["route_plan"] = {
            name: replace(plan, tokens=replace(plan.tokens, batch=shape[0], seq_len=shape[1]))
            for name, plan in batch["route_plan"].items()
        }
    return made


def padding_in_place_of(
    model: MimoModel, batch: Mapping[str, Any], further: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return ``forward``'s arguments with padding for samples, and why it may not stand for them.

    Args:
        model: the whole model.
        batch: the arguments that every step has, ``input_ids`` without elements.
        further: those that are said only where they are given.

    Returns:
        Both with padding; ``further`` has a ``problem`` too, if there is one.
    """
    made = padding_for(model, {**batch, **further}, padded_shape(model, batch["input_ids"]))
    problem = padding_problem(model)
    said = {name: made.pop(name) for name in further}
    return made, said | ({} if problem is None else {"problem": problem})


def cut_back(value: Any, shape: tuple[int, ...]) -> Any:
    """Cut ``(B, S, ...)`` of padding to a batch of ``shape`` that has no elements."""
    if value is None:
        return None
    kept = value[:0] if shape[0] == 0 else value
    return kept[:, :0].expand(*shape, *kept.shape[2:]) if shape[1] == 0 else kept


def padding_problem(model: MimoModel) -> str | None:
    """Return why padding may not stand for no samples: experts would count it.

    Stock's padding mask of routers is no way out: a replica of padding only divides by zero.
    """
    config = model.config
    names = ("moe_aux_loss_coeff", "moe_z_loss_coeff", "moe_router_enable_expert_bias")
    wanted = {name: getattr(config, name, None) for name in names}
    wanted = {name: value for name, value in wanted.items() if _counts(value)}
    if not getattr(config, "num_moe_experts", None) or not wanted:
        return None
    return (
        f"this rank's language batch has no samples, and {wanted} of its experts would count the "
        "padding that stands for them; set these to their defaults, or give every replica a "
        "sample (its loss mask may be 0)"
    )


def _counts(value: Any) -> bool:
    return any(value) if isinstance(value, list) else bool(value)
