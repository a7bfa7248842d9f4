# SPDX-License-Identifier: Apache-2.0
"""Layer specs of the language model and of encoders, with and without Transformer Engine.

Both start from stock's own GPT block spec, so MoE patterns, MLA and pipeline stages mean what
they mean there. Without Transformer Engine three parts are exchanged: the core attention, the
norms of the layers, and the final norm; with it the core attention alone, where it has none. On
Megatron-Core 0.16 the router of experts is, too.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch

from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.models.mimo import compat
from megatron.core.models.mimo.transformer.context_parallel_attention import (
    ContextParallelAttention,
)
from megatron.core.models.mimo.transformer.host_lengths import te_attention
from megatron.core.models.mimo.transformer.norms import SequenceParallelNorm
from megatron.core.models.mimo.transformer.router import PerTokenRouter
from megatron.core.models.mimo.transformer.ulysses_attention import UlyssesAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import L2Norm
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
)
from megatron.core.transformer.transformer_config import TransformerConfig

_KEPT_NORMS = (IdentityOp, L2Norm)


def use_transformer_engine() -> bool:
    """Return whether layers are Transformer Engine's: stock imports it, and a device can run it.

    One that is installed and fails to import (built for another PyTorch, say) is not used.
    ``MIMO_LAYERS=local`` in the environment prefers Megatron's local layers there, too.

    Raises:
        ValueError: ``MIMO_LAYERS`` is neither "local" nor "te".
    """
    wanted = os.environ.get("MIMO_LAYERS", "te")
    if wanted not in ("local", "te"):
        raise ValueError(f"MIMO_LAYERS={wanted!r} is neither 'local' nor 'te'; unset it for 'te'")
    if wanted == "local":
        return False
    return torch.cuda.is_available() and gpt_layer_specs.HAVE_TE


def te_attends(config: TransformerConfig) -> bool:
    """Return whether Transformer Engine has attention for this config, where it is used.

    That is in 16 bits only. For wider numbers it has none over context parallel ranks and none
    for packed sequences, and otherwise one that keeps every score.
    """
    halves = config.params_dtype in (torch.bfloat16, torch.float16)
    return config.bf16 or config.fp16 or halves


def language_layer_spec(
    config: TransformerConfig, *, pp_rank: int | None = None, vp_stage: int | None = None
) -> ModuleSpec:
    """Return causal decoder layers for ``GPTModel(transformer_layer_spec=…)``.

    Args:
        config: the language model's config.
        pp_rank: this rank's pipeline stage; needed with more than one stage.
        vp_stage: virtual pipeline stage, where there are any.

    Returns:
        A spec of the stage's ``TransformerBlock``: its layers and the final norm.

    Raises:
        ValueError: more than one pipeline stage and no ``pp_rank``, or fewer query groups than
            TP ranks.
    """
    return _block_spec(config, None, pp_rank, vp_stage)


def encoder_layer_spec(config: TransformerConfig, *, items_cut: bool = False) -> ModuleSpec:
    """Return bidirectional layers for encoders that are built on ``TransformerBlock``.

    Args:
        config: the encoder's config; one pipeline stage.
        items_cut: with CP its ranks have contiguous parts of each item (:class:`.ItemParts`), not
            chunks as the language model's have; attention exchanges them for heads.

    Returns:
        A spec of the encoder's ``TransformerBlock``: its layers and the final norm.

    Raises:
        ValueError: the config asks for more than one pipeline stage, or for fewer query groups
            than TP ranks.
    """
    if config.pipeline_model_parallel_size > 1:
        raise ValueError(
            f"An encoder has one pipeline stage, but its config says "
            f"pipeline_model_parallel_size={config.pipeline_model_parallel_size}"
        )
    cut = items_cut and config.context_parallel_size > 1
    attention = UlyssesAttention if cut else ContextParallelAttention
    return _block_spec(config, AttnMaskType.no_mask, 0, None, attention)


def _block_spec(
    config: TransformerConfig,
    mask_type: AttnMaskType | None,
    pp_rank: int | None,
    vp_stage: int | None,
    attention: type[ContextParallelAttention] = ContextParallelAttention,
) -> ModuleSpec:
    _check_query_groups(config)
    if pp_rank is None:
        if config.pipeline_model_parallel_size > 1:
            raise ValueError(
                f"pipeline_model_parallel_size is {config.pipeline_model_parallel_size}: pass "
                f"pp_rank (0 to {config.pipeline_model_parallel_size - 1}), the stage whose "
                f"layers to build"
            )
        pp_rank = 0
    with_te = use_transformer_engine()
    block: Any = gpt_layer_specs.get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=with_te,
        qk_l2_norm=config.qk_l2_norm,
        pp_rank=pp_rank,
        vp_stage=vp_stage,
    )
    attends = with_te and te_attends(config) and attention is ContextParallelAttention
    core = te_attention() if attends else attention
    layers = [_layer(spec, mask_type, with_te, core) for spec in block.layer_specs]
    norm: Any = block.layer_norm if with_te else SequenceParallelNorm
    return ModuleSpec(
        module=TransformerBlock,
        submodules=TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm),
    )


def _check_query_groups(config: TransformerConfig) -> None:
    """Below one query group per TP rank stock's attention reads the *global* TP group and rank.

    With a layout per module there is no such group, or it is another module's.
    """
    groups: Any = config.num_query_groups  # never None once the config is made
    tp_size = config.tensor_model_parallel_size
    if groups < tp_size:
        raise ValueError(
            f"num_query_groups ({groups}) must be at least tensor_model_parallel_size "
            f"({tp_size}); use TP {groups} or fewer, or more query groups"
        )


def _layer(
    spec: ModuleSpec, mask_type: AttnMaskType | None, with_te: bool, core: Any
) -> ModuleSpec:
    """A copy of stock's layer spec with this project's parts and mask type, and core attention."""
    parts: Any = spec.submodules
    attention = parts.self_attention
    if mask_type is not None:
        attention = dataclasses.replace(
            attention, params={**attention.params, "attn_mask_type": mask_type}
        )
    inner = attention.submodules if with_te else _with_norms(attention.submodules)
    inner = dataclasses.replace(inner, core_attention=core)
    changes: dict[str, Any] = {
        "self_attention": dataclasses.replace(attention, submodules=inner)
    }
    if compat.ROUTER_LOSSES_MISS_RANKS and _has_stock_router(parts.mlp):
        experts = dataclasses.replace(parts.mlp.submodules, router=PerTokenRouter)
        changes["mlp"] = dataclasses.replace(parts.mlp, submodules=experts)
    parts = dataclasses.replace(parts if with_te else _with_norms(parts), **changes)
    return dataclasses.replace(spec, submodules=parts)


def _has_stock_router(mlp: Any) -> bool:
    submodules = getattr(mlp, "submodules", None)
    return isinstance(submodules, MoESubmodules) and submodules.router is TopKRouter


def _with_norms(submodules: Any) -> Any:
    """A copy with every norm exchanged, except where there is none or it has no parameters."""
    norms = {
        field.name: SequenceParallelNorm
        for field in dataclasses.fields(submodules)
        if field.name.endswith("layernorm")
        and getattr(submodules, field.name) is not None
        and getattr(submodules, field.name) not in _KEPT_NORMS
    }
    return dataclasses.replace(submodules, **norms)
