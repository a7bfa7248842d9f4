# SPDX-License-Identifier: Apache-2.0
"""The proof models: small encoders of images and of sounds feeding a small GPT, in all variants.

All are stock Megatron-Core modules over their own process groups; ``MimoModel`` joins them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from examples.mimo.digits.data import SEQUENCE_LENGTH, VOCABULARY_SIZE
from examples.mimo.digits.options import FREEZABLE
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.models.mimo import MimoModel, MimoModelConfig
from megatron.core.models.mimo.job import settings
from megatron.core.models.mimo.job.built_model import (
    LANGUAGE,
    BuiltModel,
    finish_model,
    freeze_parts,
)
from megatron.core.models.mimo.memory.policy import EncoderMemory
from megatron.core.models.mimo.randomness import seed_everything
from megatron.core.models.mimo.training.groups import create_process_groups, make_grid
from megatron.core.models.mimo.transformer.exact_loss import ExactLossGPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from mimo_colocated.launch.layouts import Layout
from tests.models import native
from tests.models.encoders import AUDIO, MODALITIES, VISION, encoder_spec, projector_of


@dataclass(frozen=True)
class ModelSize:
    """Widths and depths; 8 heads let tensor parallelism of 1, 2, 4 and 8 divide them."""

    vision_hidden: int = 64
    vision_layers: int = 2
    vision_heads: int = 8
    audio_hidden: int = 64
    audio_layers: int = 2
    audio_heads: int = 8
    language_hidden: int = 128
    language_layers: int = 2
    language_heads: int = 8
    language_query_groups: int = 8


@dataclass(frozen=True)
class Experts:
    """Experts in place of each of the language model's MLPs.

    Attributes:
        count: experts of a layer.
        per_token: how many of them a token goes to.
        dispatcher: how tokens reach them, ``"alltoall"`` or ``"allgather"``.
        balance: the loss that keeps their loads equal, as Megatron-Core calls it, or ``"none"``.
        balance_coeff: its weight; 0 with ``"none"``.
        z_coeff: weight of the loss that keeps the router's logits small, None for none.
    """

    count: int = 4
    per_token: int = 2
    dispatcher: str = "alltoall"
    balance: str = "none"
    balance_coeff: float = 0.0
    z_coeff: float | None = None

    def settings(self, language: Layout) -> dict[str, Any]:
        """For the language model's TransformerConfig."""
        return {
            "num_moe_experts": self.count,
            "moe_router_topk": self.per_token,
            "moe_token_dispatcher_type": self.dispatcher,
            "moe_router_load_balancing_type": self.balance,
            "moe_aux_loss_coeff": self.balance_coeff,
            "moe_z_loss_coeff": self.z_coeff,
            "expert_model_parallel_size": language.ep,
            "expert_tensor_parallel_size": language.expert_tp,
        }


@dataclass(frozen=True)
class ModelOptions:
    """How the model is built and trained, apart from the layouts."""

    size: ModelSize = field(default_factory=ModelSize)
    seed: int = 1234
    dtype: torch.dtype = torch.float32
    sequence_parallel: bool = False
    bridge: str = "routed"
    packed: bool = False
    varied_lengths: bool = False  # packed batches need not be equally long
    distributed_optimizer: bool = True
    overlap_grad_reduce: bool = True
    overlap_param_gather: bool = False
    experts: Experts | None = None
    tied: bool = False
    virtual_stages: int = 1
    freeze: str = ""
    dropout: float = 0.0
    recompute: str = "none"
    memory: EncoderMemory = field(default_factory=EncoderMemory)
    native: tuple[str, ...] = ()  # of transformers' modules, sharded by PyTorch
    deepstack: tuple[int, ...] = ()  # layers after which a level of the images' rows is added


def transformer_configs(
    vision: Layout, language: Layout, options: ModelOptions, audio: Layout | None = None
) -> dict[str, TransformerConfig]:
    """Megatron configurations of all modules and of the encoders' projectors."""
    size = options.size
    common: dict[str, Any] = {
        # Larger than Megatron's default of 0.02, which is meant for widths of thousands.
        "init_method_std": 0.08,
        "attention_dropout": options.dropout,
        "hidden_dropout": options.dropout,
        "add_bias_linear": False,
        "params_dtype": options.dtype,
        "bf16": options.dtype is torch.bfloat16,
        "fp16": options.dtype is torch.float16,
        "pipeline_dtype": options.dtype,
        "calculate_per_token_loss": True,
        "bias_dropout_fusion": False,
        "bias_activation_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        **settings.RECOMPUTE[options.recompute],
    }
    configs = {}
    for name, layout in _encoders(vision, audio).items():
        side = MODALITIES[name].side
        configs[name] = TransformerConfig(
            num_layers=getattr(size, f"{side}_layers"),
            hidden_size=getattr(size, f"{side}_hidden"),
            num_attention_heads=getattr(size, f"{side}_heads"),
            tensor_model_parallel_size=layout.tp,
            # One on the language model's layout has whole images on every CP rank.
            context_parallel_size=1 if layout is language else layout.cp,
            **common,
        )
        levels = len(options.deepstack) if name == VISION else 0
        configs[projector_of(name)] = TransformerConfig(
            num_layers=1,
            hidden_size=(1 + levels) * size.language_hidden,
            num_attention_heads=size.language_heads,
            ffn_hidden_size=size.language_hidden,
            tensor_model_parallel_size=layout.tp,
            **common,
        )
    decoder = TransformerConfig(
        num_layers=size.language_layers,
        hidden_size=size.language_hidden,
        num_attention_heads=size.language_heads,
        num_query_groups=size.language_query_groups,
        ffn_hidden_size=2 * size.language_hidden,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        normalization="RMSNorm",
        tensor_model_parallel_size=language.tp,
        context_parallel_size=language.cp,
        pipeline_model_parallel_size=language.pp,
        virtual_pipeline_model_parallel_size=(
            options.virtual_stages if options.virtual_stages > 1 else None
        ),
        # Two stages that interleave exchange in both directions at once.
        overlap_p2p_comm=options.virtual_stages > 1,
        batch_p2p_comm=options.virtual_stages == 1,
        sequence_parallel=options.sequence_parallel and language.tp > 1,
        **_length_settings(language, options),
        **(options.experts.settings(language) if options.experts else {}),
        **common,
    )
    return {**configs, LANGUAGE: decoder}


def _length_settings(language: Layout, options: ModelOptions) -> dict[str, Any]:
    """Stages tell each other the lengths of packed batches, where these differ."""
    if not (options.packed and options.varied_lengths and language.pp > 1):
        return {}
    lengths: dict[str, Any] = {"variable_seq_lengths": True}
    if options.experts is None:
        # Megatron-Core refuses its own default, with experts or without.
        lengths["moe_token_dispatcher_type"] = "alltoall"
    return lengths


def _encoders(vision: Layout, audio: Layout | None) -> dict[str, Layout]:
    """Layouts by modality, of those that the model has."""
    return {VISION: vision} | ({AUDIO: audio} if audio else {})


def language_specs(
    config: TransformerConfig, groups: ProcessGroupCollection, options: ModelOptions
) -> list[ModuleSpec]:
    """One per virtual stage of this rank; without virtual stages there is one."""
    return settings.language_specs(
        ExactLossGPTModel,
        config,
        groups,
        vocab_size=VOCABULARY_SIZE,
        max_sequence_length=SEQUENCE_LENGTH,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=options.tied,
    )


def _language_specs(
    configs: dict[str, TransformerConfig],
    collections: dict[str, ProcessGroupCollection],
    grids: dict[str, Any],
    options: ModelOptions,
) -> list[ModuleSpec]:
    config, groups = configs[LANGUAGE], collections[LANGUAGE]
    if LANGUAGE in options.native:
        return [native.language_spec(config, groups, grids[LANGUAGE], options.tied)]
    return language_specs(config, groups, options)


def _encoder_spec(
    name: str,
    configs: dict[str, TransformerConfig],
    collections: dict[str, ProcessGroupCollection],
    grids: dict[str, Any],
    options: ModelOptions,
) -> ModuleSpec:
    if name in options.native:
        width = configs[LANGUAGE].hidden_size
        return native.tower_spec(configs[name], collections[name], grids[name], width)
    return encoder_spec(name, configs, collections[name])


def freeze(model: MimoModel, parts: Iterable[str]) -> None:
    """Stop the training of parts, as the job's ``--freeze`` names them."""
    freeze_parts(model, parts, {name: kind.side for name, kind in MODALITIES.items()})


def build_model(
    vision: Layout | None,
    language: Layout,
    options: ModelOptions,
    backend: str | None = None,
    rank_offset: int = 0,
    audio: Layout | None = None,
) -> BuiltModel:
    """Build, initialise and wrap the model; every rank calls it together.

    Initial weights depend on ``options.seed`` and parameter names only, never on the layouts.

    Args:
        vision, language: layouts that span the same ranks. Without one of its own the encoder is
            forced onto the language model's: every CP rank encodes all images of its replica,
            there is no bridge, and its gradients are summed over DP and CP.
        options: of the model.
        backend: of the process groups, PyTorch's default one if None.
        rank_offset: the first of the ranks.
        audio: layout of a second encoder, for sounds, beside a vision encoder with its own.

    Raises:
        ValueError: an encoder without a layout of its own beside several pipeline stages.
    """
    if vision is None and language.pp > 1:
        raise ValueError(
            f"An encoder on the language model's layout {language} would have pipeline stages; "
            "give it a layout of its own"
        )
    if vision is None and audio is not None:
        raise ValueError(
            f"An audio encoder ({audio}) needs a vision encoder with a layout of its own beside it"
        )
    place: dict[str, Any] = {"rank_offset": rank_offset, "backend": backend}
    axes = {"tp": language.tp, "cp": language.cp, "dp": language.dp, "pp": language.pp}
    if options.experts:
        axes |= {"ep": language.ep, "expt_tp": language.expert_tp}
    grids = {
        VISION: make_grid(tp=vision.tp, cp=vision.cp, dp=vision.dp, **place)
        if vision
        else None,
        # The gather bridge joins the ranks of a replica, all its stages, and no others.
        LANGUAGE: make_grid(
            **axes, **place, dp_last=options.bridge == "gather" and language.pp > 1
        ),
    }
    grids[VISION] = grids[VISION] or grids[LANGUAGE]
    if audio is not None:
        grids[AUDIO] = make_grid(tp=audio.tp, cp=audio.cp, dp=audio.dp, **place)
    collections = {name: create_process_groups(grid) for name, grid in grids.items()}
    if vision is None:
        # Every rank has whole images, so the encoder's attention is not cut over CP.
        collections[VISION] = copy.copy(collections[LANGUAGE])
        collections[VISION].cp = collections[LANGUAGE].pp
    configs = transformer_configs(vision or language, language, options, audio)
    modalities = [name for name in grids if name != LANGUAGE]
    seed_everything(options.seed)
    language_spec, *virtual_stage_specs = _language_specs(configs, collections, grids, options)
    mimo_config = MimoModelConfig(
        language_model_spec=language_spec,
        virtual_stage_specs=virtual_stage_specs,
        modality_submodules_spec={
            name: _encoder_spec(name, configs, collections, grids, options) for name in modalities
        },
        special_token_ids={name: int(MODALITIES[name].token) for name in modalities},
        module_to_grid_map=grids if vision else None,
        encoder_memory=dict.fromkeys(modalities, options.memory),
        bridge=options.bridge,
        kv_format="thd" if options.packed else "sbhd",
        deepstack_layers={VISION: options.deepstack} if options.deepstack else {},
    )
    model = MimoModel(
        mimo_config, cp_group=collections[LANGUAGE].cp, tp_group=collections[LANGUAGE].tp
    )
    mimo_config.module_to_grid_map = grids  # the optimizer's groups, with or without a bridge
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=options.overlap_grad_reduce,
        overlap_param_gather=options.overlap_param_gather,
        use_distributed_optimizer=options.distributed_optimizer,
        check_for_nan_in_grad=False,
    )
    return finish_model(
        model,
        grids,
        collections,
        configs,
        ddp_config,
        seed=options.seed,
        freeze=lambda built: freeze(built, FREEZABLE.parts(options.freeze)),
    )
