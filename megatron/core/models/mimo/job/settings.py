# SPDX-License-Identifier: Apache-2.0
"""What of grids and of Megatron-Core's configurations follows from a job's options and layouts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.models.mimo.job.built_model import LANGUAGE
from megatron.core.models.mimo.training.groups import make_grid
from megatron.core.models.mimo.transformer.layer_specs import language_layer_spec
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from mimo_colocated.launch.layouts import Layout
from mimo_colocated.launch.training_options import TrainingOptions

RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective"},
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}
"""What Megatron-Core computes again in backward instead of keeping it."""


def make_grids(
    layouts: Mapping[str, Layout], options: TrainingOptions, backend: str | None = None
) -> dict[str, HyperCommGrid]:
    """Make a grid per module over the same ranks; every rank calls it together.

    Args:
        layouts: module -> layout; the language model's is called ``"language"``.
        options: of the job.
        backend: of the process groups, PyTorch's default one if None.
    """
    return {
        name: module_grid(
            name, at, bridge=options.bridge, experts=bool(options.experts), backend=backend
        )
        for name, at in layouts.items()
    }


def module_grid(
    name: str, layout: Layout, *, bridge: str, experts: bool, backend: str | None
) -> HyperCommGrid:
    """Make the grid of one module; every rank calls it together.

    Args:
        name: of the module.
        layout: its own.
        bridge: of the model.
        experts: the language model has some.
        backend: of the process groups, PyTorch's default one if None.
    """
    axes = {"tp": layout.tp, "cp": layout.cp, "dp": layout.dp, "pp": layout.pp}
    if name == LANGUAGE and experts:
        axes |= {"ep": layout.ep, "expt_tp": layout.expert_tp}
    # The gather bridge joins the ranks of a replica, all its stages, and no others.
    dp_last = name == LANGUAGE and bridge == "gather" and layout.pp > 1
    return make_grid(**axes, backend=backend, dp_last=dp_last)


def transformer_settings(layout: Layout, options: TrainingOptions) -> dict[str, Any]:
    """Return arguments of any module's ``TransformerConfig``: number format, dropout, TP.

    Args:
        layout: of the module.
        options: of the job.
    """
    return {
        "attention_dropout": options.dropout,
        "hidden_dropout": options.dropout,
        **any_module_settings(layout, getattr(torch, options.dtype), options.recompute),
    }


def any_module_settings(layout: Layout, dtype: torch.dtype, recompute: str) -> dict[str, Any]:
    """Return arguments of any module's ``TransformerConfig`` that its layout and dtype decide.

    Args:
        layout: of the module.
        dtype: of weights and activations.
        recompute: a key of :data:`RECOMPUTE`.
    """
    return {
        "tensor_model_parallel_size": layout.tp,
        "params_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "fp16": dtype is torch.float16,
        "pipeline_dtype": dtype,
        # DDP sums; one token count divides every module's gradients.
        "calculate_per_token_loss": True,
        "bias_dropout_fusion": False,
        "bias_activation_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        **RECOMPUTE[recompute],
    }


def stage_settings(
    layout: Layout, virtual_stages: int, sequence_parallel: bool, *, lengths_differ: bool
) -> dict[str, Any]:
    """Return how a language model's ``TransformerConfig`` cuts sequence and layers.

    Args:
        layout: of the language model.
        virtual_stages: stages per rank.
        sequence_parallel: cut the sequence over TP, too.
        lengths_differ: microbatches need not be equally long.
    """
    settings: dict[str, Any] = {
        "context_parallel_size": layout.cp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": virtual_stages if virtual_stages > 1 else None,
        # Two stages that interleave exchange in both directions at once.
        "overlap_p2p_comm": virtual_stages > 1,
        "batch_p2p_comm": virtual_stages == 1,
        "sequence_parallel": sequence_parallel and layout.tp > 1,
    }
    if lengths_differ and layout.pp > 1:
        # Megatron-Core refuses lengths that differ with its own default, with experts or without.
        settings |= {"variable_seq_lengths": True, "moe_token_dispatcher_type": "alltoall"}
    return settings


def language_settings(options: TrainingOptions, *, lengths_differ: bool = False) -> dict[str, Any]:
    """Return arguments of the language model's ``TransformerConfig`` beside those of any module.

    Args:
        options: of the job.
        lengths_differ: packed batches need not be equally long.
    """
    settings: dict[str, Any] = {
        "num_layers": options.language_layers,
        **stage_settings(
            options.language,
            options.virtual_stages,
            options.sequence_parallel,
            lengths_differ=options.packed and lengths_differ,
        ),
    }
    return settings | (_expert_settings(options) if options.experts else {})


def _expert_settings(options: TrainingOptions) -> dict[str, Any]:
    """Balanced by the loss per sample, which is the same in every layout."""
    return {
        "num_moe_experts": options.experts,
        "moe_router_topk": min(2, options.experts),
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_load_balancing_type": "seq_aux_loss",
        "moe_aux_loss_coeff": 1e-3,
        "moe_z_loss_coeff": None,
        "expert_model_parallel_size": options.language.ep,
        "expert_tensor_parallel_size": options.language.expert_tp,
    }


def ddp_config(options: TrainingOptions) -> DistributedDataParallelConfig:
    """Return how every module's gradients are reduced."""
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=options.overlap_grad_reduce,
        overlap_param_gather=options.overlap_param_gather and options.distributed_optimizer,
        use_distributed_optimizer=options.distributed_optimizer,
        check_for_nan_in_grad=False,
    )


def language_specs(
    module: type, config: TransformerConfig, groups: ProcessGroupCollection, **params: Any
) -> list[ModuleSpec]:
    """Return a spec per virtual stage of this rank; without virtual stages there is one.

    Args:
        module: the GPT's class.
        config: of the language model.
        groups: of its grid.
        **params: of the module, such as ``vocab_size`` and ``max_sequence_length``.
    """
    stages = config.virtual_pipeline_model_parallel_size or 1
    first, last = groups.pp.rank() == 0, groups.pp.rank() == groups.pp.size() - 1
    specs = []
    for number in range(stages):
        vp_stage = number if stages > 1 else None
        own = {
            "config": config,
            "transformer_layer_spec": language_layer_spec(
                config, pp_rank=groups.pp.rank(), vp_stage=vp_stage
            ),
            "pre_process": first and number == 0,
            "post_process": last and number == stages - 1,
            "vp_stage": vp_stage,
            # MimoModel shards the fused sequence itself, after rows and text are merged.
            "scatter_embedding_sequence_parallel": False,
            "pg_collection": groups,
        }
        specs.append(ModuleSpec(module=module, params={**own, **params}))
    return specs


def projector_spec(
    config: TransformerConfig, input_size: int, tp_group: torch.distributed.ProcessGroup
) -> ModuleSpec:
    """Return stock's MLP from an encoder's width to the language model's.

    Args:
        config: of the projector; its hidden size is the language model's.
        input_size: the encoder's width.
        tp_group: of the encoder's grid.
    """
    mlp = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    return ModuleSpec(
        module=MultimodalProjector,
        params={
            "config": config,
            "submodules": mlp,
            "projector_type": "mlp",
            "input_size": input_size,
            "tp_group": tp_group,
        },
    )
