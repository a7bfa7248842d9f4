# SPDX-License-Identifier: Apache-2.0
"""Real stock models in a layout, and the same one unsharded, for the 8-rank tests.

Both are built by every rank. Weights are a function of (seed, name), so they are the same model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import (
    _allreduce_non_tensor_model_parallel_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.mimo.training.groups import create_process_groups, make_grid
from megatron.core.models.mimo.training.initial_weights import initialize_weights, tp_shard
from megatron.core.models.mimo.transformer.layer_specs import (
    encoder_layer_spec,
    language_layer_spec,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig

WORLD, SEED, VOCABULARY = 8, 11, 32


@dataclass(frozen=True)
class Layout:
    """TP and CP; DP is what is left of the 8 ranks."""

    tp: int = 1
    cp: int = 1
    sequence_parallel: bool = False

    def __str__(self) -> str:
        return f"tp{self.tp}cp{self.cp}{'sp' if self.sequence_parallel else ''}"


@dataclass(frozen=True)
class Shape:
    """The model apart from its layout."""

    query_groups: int = 4
    normalization: str = "RMSNorm"
    gated: bool = True
    bias: bool = False
    qk_layernorm: bool = False
    tied: bool = False
    position: str = "rope"
    dtype: torch.dtype = torch.float64
    more: dict[str, Any] = field(default_factory=dict)

    def config(self, layout: Layout) -> TransformerConfig:
        return TransformerConfig(
            num_layers=2,
            hidden_size=32,
            num_attention_heads=4,
            num_query_groups=self.query_groups,
            ffn_hidden_size=40,
            normalization=self.normalization,
            gated_linear_unit=self.gated,
            activation_func=torch.nn.functional.silu if self.gated else torch.nn.functional.gelu,
            add_bias_linear=self.bias,
            qk_layernorm=self.qk_layernorm,
            # Large enough that attention is far from uniform and norms are not saturated.
            init_method_std=0.3,
            tensor_model_parallel_size=layout.tp,
            context_parallel_size=layout.cp,
            sequence_parallel=layout.sequence_parallel,
            params_dtype=self.dtype,
            attention_dropout=0.0,
            hidden_dropout=0.0,
            bias_activation_fusion=False,
            bias_dropout_fusion=False,
            masked_softmax_fusion=False,
            gradient_accumulation_fusion=False,
            **self.more,
        )


@contextlib.contextmanager
def process_groups(layout: Layout) -> Iterator[ProcessGroupCollection]:
    """Groups of a layout over the 8 ranks, gone afterwards. Each rank seeds its RNG tracker."""
    grid = make_grid(tp=layout.tp, cp=layout.cp, dp=WORLD // (layout.tp * layout.cp))
    groups = create_process_groups(grid)
    model_parallel_cuda_manual_seed(SEED, tp_rank=groups.tp.rank(), ep_rank=0, etp_rank=0)
    try:
        yield groups
    finally:
        grid.destroy()


def gpt(shape: Shape, layout: Layout, groups: ProcessGroupCollection) -> GPTModel:
    config = shape.config(layout)
    model = GPTModel(
        config,
        language_layer_spec(config),
        vocab_size=VOCABULARY,
        max_sequence_length=64,
        position_embedding_type=shape.position,
        share_embeddings_and_output_weights=shape.tied,
        pg_collection=groups,
    )
    initialize_weights(model, SEED)
    return model


def encoder(shape: Shape, layout: Layout, groups: ProcessGroupCollection) -> TransformerBlock:
    config = shape.config(layout)
    model = TransformerBlock(config, encoder_layer_spec(config), pg_collection=groups)
    initialize_weights(model, SEED)
    return model


def finalize_gradients(
    model: torch.nn.Module, layout: Layout, groups: ProcessGroupCollection
) -> None:
    """Stock's own sum over TP of the partial gradients, then the sum over CP that DDP does."""
    model.ddp_config = DistributedDataParallelConfig()
    _allreduce_non_tensor_model_parallel_grads([model], model.config, groups.tp)
    for parameter in model.parameters():
        if layout.cp > 1 and parameter.grad is not None:
            dist.all_reduce(parameter.grad, group=groups.cp)


def own_part(
    whole: torch.Tensor, parameter: torch.nn.Parameter, name: str, groups: ProcessGroupCollection
) -> torch.Tensor:
    """This rank's part of an unsharded weight or gradient."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return whole
    return tp_shard(
        whole,
        rank=groups.tp.rank(),
        size=groups.tp.size(),
        dim=parameter.partition_dim,
        # tests/…/test_initial_weights.py holds this rule against the MLP's function.
        blocks=2 if whole.size(0) == 80 and "linear_fc1" in name else 1,
    )
