# SPDX-License-Identifier: Apache-2.0
"""Cross entropy over a vocabulary that TP splits; backward needs no context of the caller's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional

REDUCTIONS = ("none", "sum", "mean")


def cross_entropy(
    logits: Tensor, labels: Tensor, *, reduction: str = "mean", ignore_index: int = -100
) -> Tensor:
    """Return ``torch.nn.functional.cross_entropy`` of logits whose vocabulary TP may split.

    Logits stay where they are; three sums of a number per token go over TP. As in torch, the
    mean is over this rank's tokens, and NaN without any.

    Args:
        logits: ``(..., vocabulary)``, a ``DTensor`` split along its last dim or a plain tensor.
        labels: ``(...)``, of the same tokens, alike on the ranks of a TP group.
        reduction: ``"none"``, ``"sum"`` or ``"mean"``.
        ignore_index: label of tokens that do not count.

    Returns:
        A plain fp32 tensor: a number, or with ``"none"`` one per token, ``(...)``.

    Raises:
        ValueError: an unknown reduction, shapes that differ, logits split along another dim.
    """
    _check(logits, labels, reduction)
    labels = labels.to(logits.device)
    if isinstance(logits, DTensor):
        losses = _split(logits, labels, ignore_index)
    else:
        flat = logits.float().flatten(0, -2)
        losses = functional.cross_entropy(
            flat, labels.flatten(), reduction="none", ignore_index=ignore_index
        ).view(labels.shape)
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else total / (labels != ignore_index).sum()


def sum_over_data(value: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the sum of a scalar over the data ranks, as a plain tensor that needs no gradient.

    Over the world it would be TP times as much: the ranks of a TP group have the same tokens.

    Args:
        value: of this rank, alike in its TP group.
        group: the data ranks, ``mesh.get_group("fsdp")``.
    """
    total = value.detach().clone()
    dist.all_reduce(total, group=group)
    return total


def causal_loss(group: dist.ProcessGroup) -> Callable[..., Tensor]:
    """Return what stands in for a model's ``loss_function``: the loss of all data ranks' tokens.

    Its value is the sum of the token losses of all data ranks over ``num_items_in_batch``, or
    over the number of their labels; the same on all ranks. Gradients sum to those of it: FSDP
    adds them up over data ranks.

    Args:
        group: the data ranks.
    """

    def loss_function(
        logits: Tensor,
        labels: Tensor,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        if shift_labels is None:
            shift_labels = functional.pad(labels, (0, 1), value=ignore_index)[..., 1:].contiguous()
        total = cross_entropy(logits, shift_labels, reduction="sum", ignore_index=ignore_index)
        count = (shift_labels != ignore_index).sum().to(total)
        sums = sum_over_data(torch.stack([total.detach(), count]), group)
        divisor = sums[1] if num_items_in_batch is None else num_items_in_batch
        # The value of all, the gradient of this rank's part; without any label zero, not NaN.
        return (total + (sums[0] - total).detach()) / _at_least_one(divisor)

    return loss_function


def _at_least_one(count: Tensor | int) -> Tensor | int:
    return count.clamp_min(1) if torch.is_tensor(count) else max(count, 1)


def _check(logits: Tensor, labels: Tensor, reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {list(REDUCTIONS)}, got {reduction!r}")
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} need labels {tuple(logits.shape[:-1])}, got "
            f"{tuple(labels.shape)}"
        )
    if isinstance(logits, DTensor):
        wanted = Shard(logits.ndim - 1)
        if logits.device_mesh.ndim != 1 or logits.placements[0] != wanted:
            raise ValueError(
                f"logits must be split along their last dim, {wanted} on a mesh of one dim, got "
                f"{logits.placements}; keep them as the model returns them, or take full_tensor()"
            )


def _split(logits: DTensor, labels: Tensor, ignore_index: int) -> Tensor:
    mesh = logits.device_mesh
    width = -(-logits.shape[-1] // mesh.size())  # the last ranks may have less, or nothing
    first = min(mesh.get_local_rank() * width, logits.shape[-1])
    return _SplitCrossEntropy.apply(
        logits.to_local(), labels, first, ignore_index, mesh.get_group()
    )


class _SplitCrossEntropy(torch.autograd.Function):
    """Losses ``(...)`` of own logits ``(..., v)``; columns ``first ..`` of the vocabulary.

    forward: log of the sum of exponentials over all columns, less the label's logit.
    backward: softmax less one at the label, times the token's gradient, on own columns alone. The
    loss is the same on all ranks of the group, and so is its gradient: nothing is summed.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, first: int, ignore: int, group: Any
    ) -> Tensor:
        own = logits.float()
        if own.shape[-1] == 0:  # fewer columns than ranks
            own = own.new_full((*own.shape[:-1], 1), float("-inf"))
        highest = own.amax(dim=-1)
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
        index = labels - first
        here = (index >= 0) & (index < logits.shape[-1]) & (labels != ignore)
        index = index.where(here, 0)
        mine = own.gather(-1, index[..., None])[..., 0].where(here, 0.0)
        sums = torch.stack([(own - highest[..., None]).exp().sum(-1), mine])
        dist.all_reduce(sums, group=group)
        total = sums[0].log() + highest
        ctx.save_for_backward(logits, total, index, here, labels != ignore)
        return (total - sums[1]).where(labels != ignore, 0.0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        logits, total, index, here, counts = ctx.saved_tensors
        softmax = (logits.float() - total[..., None]).exp()
        if softmax.shape[-1]:
            softmax.scatter_add_(-1, index[..., None], -here[..., None].to(softmax))
        softmax *= gradient.where(counts, 0.0)[..., None]
        return softmax.to(logits), None, None, None, None
