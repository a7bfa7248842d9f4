# SPDX-License-Identifier: Apache-2.0
"""Sizes of a Hugging Face folder's model, for planning; no weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.core.models.mimo.huggingface.composites import (
    Composite,
    EncoderPart,
    LanguagePart,
    describe,
)
from megatron.core.models.mimo.huggingface.configuration import read_config
from megatron.core.models.mimo.plan.shapes import EncoderShape, LanguageShape, Shapes, Stack

ITEM_TOKENS = 1024
"""Tokens of an image where the model takes any size."""


def folder_shapes(folder: str | Path, item_tokens: int = ITEM_TOKENS) -> Shapes:
    """Return the sizes of a folder's model.

    Args:
        folder: with ``config.json``.
        item_tokens: of an image, where the model takes any size.

    Raises:
        UnsupportedModelError: its kind is not known, or a setting is not supported.
    """
    return composite_shapes(describe(read_config(Path(folder))), item_tokens)


def composite_shapes(composite: Composite, item_tokens: int = ITEM_TOKENS) -> Shapes:
    """Return the sizes of a model; arguments as of :func:`folder_shapes`.

    Args:
        composite: what it is made of.
        item_tokens: as there.
    """
    language = _language(composite.language)
    width = language.stack.hidden
    encoders = {part.modality: _encoder(part, width, item_tokens) for part in composite.encoders}
    return Shapes(language, encoders)


def _language(part: LanguagePart) -> LanguageShape:
    params = part.family.params(part.config)
    return LanguageShape(
        _stack(part.family.settings(part.config)),
        vocab=params["vocab_size"],
        tied=bool(params["share_embeddings_and_output_weights"]),
    )


def _stack(settings: Mapping[str, Any]) -> Stack:
    """Layers from the fields of their ``TransformerConfig``."""
    layers, heads = settings["num_layers"], settings["num_attention_heads"]
    experts = settings.get("num_moe_experts") or 0
    every = settings.get("moe_layer_freq", [1] * layers) if experts else []
    return Stack(
        layers=layers,
        hidden=settings["hidden_size"],
        ffn=settings["ffn_hidden_size"],
        heads=heads,
        groups=settings.get("num_query_groups") or heads,
        head=settings.get("kv_channels") or settings["hidden_size"] // heads,
        gated=bool(settings.get("gated_linear_unit")),
        experts=experts,
        chosen=settings.get("moe_router_topk", 0) if experts else 0,
        expert_ffn=settings.get("moe_ffn_hidden_size", 0) if experts else 0,
        expert_layers=sum(every),
    )


def _encoder(part: EncoderPart, width: int, item_tokens: int) -> EncoderShape:
    config, stack = part.config, _stack(part.family.settings(part.config))
    if hasattr(config, "spatial_merge_size"):
        return _merging(part, stack, item_tokens)
    if hasattr(config, "max_source_positions"):
        # Two convolutions of three steps, over twice the tokens and over the tokens' inputs twice.
        tokens = config.max_source_positions
        patch = 6 * config.num_mel_bins + 3 * stack.hidden
        return EncoderShape(
            stack, tokens, tokens // 2, patch, stack.hidden, 0,
            sequence_parallel=part.sequence_parallel, embedded=tokens, inner=3 * stack.hidden,
        )  # fmt: skip
    return _images(part, stack, width)


def _merging(part: EncoderPart, stack: Stack, item_tokens: int) -> EncoderShape:
    """Of towers that take images of any size and merge squares of patches."""
    config = part.config
    merged = config.spatial_merge_size**2
    window = getattr(config, "window_size", 0) // config.patch_size
    width = stack.hidden * merged
    return EncoderShape(
        stack,
        tokens=-(-item_tokens // merged) * merged,
        rows=-(-item_tokens // merged),
        patch=config.in_channels * config.temporal_patch_size * config.patch_size**2,
        row=width,
        projected=width,
        levels=len(getattr(config, "deepstack_visual_indexes", ())),
        window=window**2,
        full_layers=len(getattr(config, "fullatt_block_indexes", ())) if window else 0,
        sequence_parallel=part.sequence_parallel,
    )


def _images(part: EncoderPart, stack: Stack, width: int) -> EncoderShape:
    """Of towers whose images have one size; a class token makes no row."""
    config, side = part.config, part.config.patch_size
    patches = getattr(config, "num_patches", None) or (config.image_size // side) ** 2
    clip = config.model_type == "clip_vision_model"
    return EncoderShape(
        stack,
        tokens=patches + clip,
        rows=patches,
        patch=config.num_channels * side**2,
        row=stack.hidden * part.features,
        projected=width,
        sequence_parallel=part.sequence_parallel,
        cuts_items=part.cuts_items,
    )
