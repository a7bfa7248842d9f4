# SPDX-License-Identifier: Apache-2.0
"""FLOPs by formula against what PyTorch's counter sees of transformers' own models.

Within 1 %: both count products only, and ours leave out a few that do not grow with the model
(rotary frequencies, position tables). The counter sees the whole square of scores.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron.core.models.mimo.huggingface.composites import describe
from megatron.core.models.mimo.huggingface.plan_shapes import composite_shapes
from megatron.core.models.mimo.memory.plan import TransformerShape, transformer_bytes
from megatron.core.models.mimo.plan.flops import (
    Flops,
    encoder_flops,
    language_flops,
    seen_pairs,
)
from megatron.core.models.mimo.plan.shapes import EncoderShape, Stack
from tests.unit_tests.mimo.huggingface import llava_models, models, qwen_vl_models, sounds

# Nothing of Megatron-Core is in them.
pytestmark = pytest.mark.once

_BOUND = 0.01
_LENGTH = 48


def counted(call: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops()


def off(ours: Flops, theirs: int) -> float:
    return abs(ours.forward / theirs - 1)


@pytest.mark.parametrize("name", [*models.DENSE, *models.SPARSE])
def test_language_models(name: str) -> None:
    model = {**models.DENSE, **models.SPARSE}[name]()
    model.set_attn_implementation("eager")
    if name in models.SPARSE:
        model.set_experts_implementation("eager")
    shape = composite_shapes(describe(model.config)).language
    # transformers has no padded vocabulary.
    shape = type(shape)(shape.stack, models.VOCABULARY, shape.tied)
    ids = torch.randint(0, models.VOCABULARY, (2, _LENGTH))
    theirs = counted(lambda: model(ids))
    assert off(language_flops(shape, [_LENGTH] * 2, causal=False), theirs) < _BOUND
    # A head's width forgotten, or the layers' experts all met by every token, would be far off.
    assert off(language_flops(shape, [_LENGTH] * 2, causal=False) * 1.02, theirs) > _BOUND


@pytest.mark.parametrize("name", ["clip-llama", "siglip-qwen2", "siglip2-llama"])
def test_image_towers(name: str) -> None:
    model = llava_models.llava(name)
    model.set_attn_implementation("eager")
    shape = composite_shapes(describe(model.config)).encoders["images"]
    tower = model.model.vision_tower
    layers = model.config.vision_config.num_hidden_layers
    # All layers run; the model uses fewer of them.
    stack = Stack.of(layers, 24, 40, 4)
    if name == "siglip2-llama":
        pixels = {
            "pixel_values": torch.randn(2, 16, 48),
            "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long),
            "spatial_shapes": torch.tensor([[4, 4]] * 2),
        }
    else:
        pixels = {"pixel_values": torch.randn(2, 3, llava_models.SIDE, llava_models.SIDE)}
    theirs = counted(lambda: _first_layers(tower, pixels))
    if name == "siglip2-llama":
        # It resizes its table of 16 positions by a product, as large as all of a tiny layer's.
        theirs -= 2 * 2 * 16 * 16 * 24
    whole = EncoderShape(stack, shape.tokens, shape.rows, shape.patch, 1, 0)
    assert shape.tokens == (16 if name == "siglip2-llama" else shape.rows + ("clip" in name))
    # Without a projector; a class token is no patch.
    ours = encoder_flops(whole, 2, width=0)
    embedded = 2 * 2 * shape.rows * shape.patch * stack.hidden
    assert off(Flops(ours.layers, ours.attention, embedded), theirs) < _BOUND


def _first_layers(tower: Any, pixels: dict[str, torch.Tensor]) -> None:
    """Without SigLIP's pooling head, which the models do not have."""
    inner = getattr(tower, "vision_model", tower)
    if hasattr(inner, "head"):
        inner.use_head = False
    tower(**pixels)


@pytest.mark.parametrize("name", qwen_vl_models.MODELS)
def test_towers_that_merge_patches(name: str) -> None:
    model = qwen_vl_models.MODELS[name]()
    model.set_attn_implementation("eager")
    # Windows of 4 x 4 patches divide 16 x 16 of them.
    grid = torch.tensor([[1, 16, 16]])
    pixels = torch.randn(256, 96)
    shape = composite_shapes(describe(model.config), item_tokens=256).encoders["images"]
    theirs = counted(lambda: model.model.visual(pixels, grid_thw=grid))
    assert off(encoder_flops(shape, 1, width=64), theirs) < _BOUND
    if name == "qwen2_5_vl":
        assert (shape.window, shape.full_layers, shape.levels) == (16, 1, 0)
        assert off(encoder_flops(EncoderShape(**{**vars(shape), "window": 0}), 1, 64), theirs) > 0.2
    else:
        assert (shape.window, shape.full_layers, shape.levels) == (0, 0, 3)


def test_whispers_encoder() -> None:
    model = sounds.qwen2_audio()
    model.set_attn_implementation("eager")
    shape = composite_shapes(describe(model.config)).encoders["audio"]
    theirs = counted(lambda: model.model.audio_tower(torch.randn(1, sounds.BINS, sounds.STEPS)))
    theirs += counted(
        lambda: model.model.multi_modal_projector(torch.randn(1, shape.rows, shape.row))
    )
    assert (shape.tokens, shape.rows) == (sounds.POSITIONS, sounds.POSITIONS // 2)
    assert off(encoder_flops(shape, 1, model.config.text_config.hidden_size), theirs) < _BOUND


def test_causal_and_packed_scores_are_those_that_a_mask_lets_through() -> None:
    lengths = [3, 5, 1]
    packed = torch.block_diag(*(torch.ones(n, n) for n in lengths))
    assert seen_pairs(lengths, causal=True) == int(packed.tril().sum())
    assert seen_pairs(lengths, causal=False) == int(packed.sum())


def test_a_frozen_module_has_a_third_of_the_flops() -> None:
    flops = Flops(2, 3, 5)
    assert flops.of_step() == 30
    assert flops.of_step(trained=False) == 10
    # What lies before it trains: no gradients of weights. Nothing before it does: none of inputs.
    assert flops.of_step(trained=False, through=True) == 10 + 2 + 5 + 2 * 3
    assert flops.of_step(trained=True, through=False) == 10 + 2 + 5 + 2 * 3


def test_the_encoder_is_the_one_whose_memory_is_planned() -> None:
    """``memory/plan.py`` compares policies by the same products."""
    shape = EncoderShape(Stack.of(2, 64, 256, 8), 16, 16, 48, 64, 32)
    ours = encoder_flops(shape, 3, width=32)
    theirs = transformer_bytes(
        TransformerShape(2, 64, 256, 8, tokens=16, patch=48, projected=32), 3
    )
    assert ours.forward == theirs.encoder_flops + theirs.projector_flops
