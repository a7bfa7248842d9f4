# SPDX-License-Identifier: Apache-2.0
"""A dense attention mask is used as it is given, or refused by name; never ignored.

Megatron-Core's convention: bool, True where attention is *forbidden*, ``(B, 1, S, S)`` or
``(1, 1, S, S)``. It says all: it replaces the causal mask of the layers. A language model without
Megatron's attention layers has a convention of its own and gets the mask as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from megatron.core.models.mimo.model.language_batch import LanguageBatch
from megatron.core.models.mimo.transformer.context_parallel_attention import (
    ContextParallelAttention,
)
from megatron.core.transformer.dot_product_attention import DotProductAttention

_CONVERT = (
    "from a Hugging Face mask `keep` (B, S), 1 for real tokens, make "
    "`~keep.bool()[:, None, None, :] | torch.ones(S, S, dtype=torch.bool).triu(1)`, from an "
    "additive one `mask < 0`"
)


class MaskError(ValueError, RuntimeError):
    """A mask that cannot be used; stock's own refusal under CP is a ``RuntimeError``."""


def check_mask(
    stages: Sequence[Any], use_cp: bool, batch: LanguageBatch
) -> None:
    """Refuse a mask that would not act on attention as it says.

    Args:
        stages: the language model's on this rank.
        use_cp: whether the sequence is cut for CP.
        batch: with a mask.

    Raises:
        MaskError: under CP; with packing; another dtype or shape; layers that do not read it.
    """
    mask: Any = batch.attention_mask
    if use_cp:
        raise MaskError(
            "MIMO context parallelism requires attention_mask=None, got a mask of shape "
            f"{tuple(mask.shape)}: a dense mask does not fit the cut sequence. Mask "
            "by a causal attn_mask_type or by packing (packing_kwargs)."
        )
    if batch.packing_kwargs is not None:
        raise MaskError(
            "attention_mask and packing_kwargs were both given; cu_seqlens says who sees whom in a "
            "packed batch, leave attention_mask out"
        )
    layers = list(_attention_of(stages))
    if layers:
        _check_form(mask, *batch.input_ids.shape)
    for name, core in layers:
        _check_reader(name, core)


def _attention_of(stages: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """The core attention of every layer of this rank's language stages, by the layer's name."""
    for stage in stages:
        for name, module in stage.named_modules() if isinstance(stage, nn.Module) else ():
            core = getattr(module, "core_attention", None)
            if core is not None:
                yield name, core


def _check_form(mask: torch.Tensor, batch: int, length: int) -> None:
    shapes = dict.fromkeys([(batch, 1, length, length), (1, 1, length, length)])
    wanted = " or ".join(map(str, shapes))
    if mask.dtype != torch.bool:
        raise MaskError(
            f"attention_mask must be bool, True where attention is forbidden, of shape {wanted}, "
            f"got {mask.dtype} of shape {tuple(mask.shape)}; {_CONVERT}"
        )
    if tuple(mask.shape) not in shapes:
        raise MaskError(
            f"attention_mask must have the shape {wanted}, got {tuple(mask.shape)}: it says for "
            "each query which keys are forbidden, later ones too, since it replaces the causal "
            f"mask; {_CONVERT}"
        )


def _check_reader(name: str, core: Any) -> None:
    """Attention that does not read the given mask would ignore it."""
    if isinstance(core, ContextParallelAttention):
        return
    if isinstance(core, DotProductAttention):
        # A window takes the mask's place there, and fused kernels have a causal one of their own.
        softmax = core.scale_mask_softmax
        fused = softmax.scaled_masked_softmax_fusion and softmax.input_in_float16
        if softmax.window_size is None and not fused:
            return
    raise MaskError(
        f"attention_mask is given, but {type(core).__name__} of '{name}' does not read it; build "
        "the layers with layer_specs.language_layer_spec where Transformer Engine is not used, or "
        "mask causally or by packing (attention_mask=None)"
    )
