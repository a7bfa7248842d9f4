# SPDX-License-Identifier: Apache-2.0
"""Token losses of a vocabulary that is cut over TP, with gradients as precise as the logits.

Megatron-Core's fused native cross entropy rounds the gradient of the logits to bf16 whatever the
logits are, which is an error of about 1e-3 in all gradients of an fp32 run. Its plain one, in
0.16, takes the TP group of a global state that a layout per module does not have.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core.models.gpt import GPTModel


class ExactLossGPTModel(GPTModel):
    """``GPTModel`` whose token losses come from :func:`vocab_parallel_loss`."""

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Return the token losses ``(b, s)`` of labels ``(b, s)`` and logits ``(s, b, V/tp)``."""
        losses = vocab_parallel_loss(logits, labels.transpose(0, 1), self.pg_collection.tp)
        return losses.transpose(0, 1).contiguous()


def vocab_parallel_loss(logits: Tensor, labels: Tensor, tp_group: dist.ProcessGroup) -> Tensor:
    """Return the cross entropy of every token, in fp32 or, of fp64 logits, in fp64.

    Args:
        logits: ``(..., V/tp)``, this rank's part of the vocabulary.
        labels: ``(...)`` int64, over the whole vocabulary; the same on all ranks of the group.
        tp_group: the ranks that share the vocabulary, in its order.

    Returns:
        ``(...)`` losses, the same on all ranks; gradient of the logits ``(..., V/tp)``: softmax
        minus one-hot, this rank's part, no collective.
    """
    return _VocabParallelLoss.apply(logits, labels, tp_group)


class _VocabParallelLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, tp_group: dist.ProcessGroup) -> Tensor:
        width = logits.shape[-1]
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        largest = wide.amax(dim=-1)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=tp_group)
        shifted = wide - largest.unsqueeze(-1)
        places = labels - tp_group.rank() * width
        mine = (places >= 0) & (places < width)
        places = places.clamp(0, width - 1).unsqueeze(-1)
        softmax = shifted.exp()
        wanted = shifted.gather(-1, places).squeeze(-1) * mine
        sums = torch.stack([softmax.sum(dim=-1), wanted])
        dist.all_reduce(sums, group=tp_group)
        softmax /= sums[0].unsqueeze(-1)
        ctx.save_for_backward(softmax, places, mine)
        ctx.dtype = logits.dtype
        return sums[0].log() - sums[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        softmax, places, mine = ctx.saved_tensors
        result = softmax * grad.unsqueeze(-1)
        result.scatter_add_(-1, places, -(grad * mine).unsqueeze(-1))
        return result.to(ctx.dtype), None, None
