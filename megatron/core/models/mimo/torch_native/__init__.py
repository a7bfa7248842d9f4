# SPDX-License-Identifier: Apache-2.0
"""A model of transformers as it is, sharded by PyTorch's own tools: DTensor TP, SP and FSDP2.

``parallelize(model, grid)`` shards it in place. The residual stream of a sharded model is a
``DTensor`` cut along the sequence, so it keeps the global length: any length works, and rotary
tables and masks, which transformers builds from it, are those of the whole sequence. Attention
and MLPs compute on plain tensors of this rank's heads and columns.
"""

from megatron.core.models.mimo.torch_native.context_parallel import own_chunks
from megatron.core.models.mimo.torch_native.gathered import (
    clip_grad_norm,
    full_gradients,
    full_state,
)
from megatron.core.models.mimo.torch_native.loss import cross_entropy, sum_over_data
from megatron.core.models.mimo.torch_native.meshes import mesh_of
from megatron.core.models.mimo.torch_native.parallelize import parallelize
from megatron.core.models.mimo.torch_native.plans import Plan, plan_of

__all__ = [
    "Plan",
    "clip_grad_norm",
    "cross_entropy",
    "full_gradients",
    "full_state",
    "mesh_of",
    "own_chunks",
    "parallelize",
    "plan_of",
    "sum_over_data",
]
