# SPDX-License-Identifier: Apache-2.0
"""What the ranks hold together: whole weights and gradients, and the norm of all gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from megatron.core.models.mimo.torch_native.meshes import FSDP, TP, mesh_in


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's whole state dict under Hugging Face's names; all its ranks call it.

    It is the unsharded model's, a tied weight under each of its names, and
    ``load_state_dict`` of a model of transformers takes it.

    Args:
        model: that ``parallelize`` returned.
    """
    whole: dict[int, Tensor] = {}
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in whole:
            whole[id(tensor)] = gathered(tensor.detach())
        state[name] = whole[id(tensor)]
    return state


def full_gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """Return every whole gradient under Hugging Face's names; all ranks of the model call it.

    Args:
        model: that ``parallelize`` returned.

    Returns:
        name -> gradient in the weight's whole shape, None where there is none. A tied weight has
        one, under its first name.
    """
    return {
        name: None if parameter.grad is None else gathered(parameter.grad)
        for name, parameter in model.named_parameters()
    }


@torch.no_grad()
def clip_grad_norm(model: nn.Module, max_norm: float) -> Tensor:
    """Scale all gradients down to a norm and return what it was; all ranks of the model call it.

    Args:
        model: that ``parallelize`` returned.
        max_norm: largest norm that stays; ``float("inf")`` only measures.

    Returns:
        The norm of the whole model's gradient, a plain fp32 number, the same on all ranks. A
        gradient that TP does not split counts once.
    """
    mesh = mesh_in(model)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    sums = torch.zeros(2, device=next(model.parameters()).device)  # not split over TP, split
    for gradient in gradients:
        data, tp = _split_over(gradient, FSDP), _split_over(gradient, TP)
        share = 1 if data else mesh[FSDP].size()
        sums[int(tp)] += _local(gradient).float().square().sum() / share
    dist.all_reduce(sums, group=mesh.get_group(FSDP))
    dist.all_reduce(sums[1:], group=mesh.get_group(TP))
    norm = sums.sum().sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp_max(1.0)
    for gradient in gradients:
        _local(gradient).mul_(scale)
    return norm


def gathered(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor, plain; all ranks of its mesh call it."""
    if not isinstance(tensor, DTensor):
        return tensor
    names = tensor.device_mesh.mesh_dim_names
    local = tensor.to_local()
    # TP split it first and FSDP each part again, so they are joined the other way round.
    for axis, name in sorted(enumerate(names or ()), key=lambda pair: pair[1] != FSDP):
        placement: Any = tensor.placements[axis]
        if not isinstance(placement, Replicate):
            local = _joined(local, placement.dim, tensor.device_mesh.get_group(name))
    return local


def _joined(local: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    sizes = [torch.empty(1, dtype=torch.long, device=local.device) for _ in range(group.size())]
    dist.all_gather(sizes, torch.tensor([local.shape[dim]], device=local.device), group=group)
    longest = max(int(size) for size in sizes)
    moved = local.movedim(dim, 0)
    padded = moved.new_zeros(longest, *moved.shape[1:])
    padded[: len(moved)] = moved
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    pieces = [part[: int(size)] for part, size in zip(parts, sizes, strict=True)]
    return torch.cat(pieces).movedim(0, dim).contiguous()


def _split_over(tensor: Tensor, name: str) -> bool:
    if not isinstance(tensor, DTensor):
        return False
    names = tensor.device_mesh.mesh_dim_names or ()
    return name in names and not tensor.placements[names.index(name)].is_replicate()


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
