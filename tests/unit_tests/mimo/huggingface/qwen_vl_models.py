# SPDX-License-Identifier: Apache-2.0
"""Tiny Qwen2.5-VL and Qwen3-VL of transformers' own classes, and a batch with images of many sizes.

Windows do not divide the images, layers with and without windows alternate, some samples have
several images, one has none, one has an image of two frames.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from megatron.core.models.mimo.huggingface.positions import multimodal_positions
from tests.unit_tests.mimo.huggingface import harness, models

TOWER = "qwen"
IMAGE, VIDEO, START, END = 98, 97, 96, 95
TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
TEXT = {**models.SIZES, "hidden_size": 64, "max_position_embeddings": 96, "num_hidden_layers": 4}
VISION = {
    "depth": 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "out_hidden_size": 64,
    "patch_size": 4,
}
GRIDS = [[[1, 4, 6], [1, 2, 4]], [], [[2, 4, 4]], [[1, 6, 10]]]
"""Images of each sample, in patches."""


def qwen2_5_vl(**more: Any) -> nn.Module:
    """Window attention but in one layer."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    config = transformers.Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": rope},
        vision_config={**VISION, "window_size": 16, "fullatt_block_indexes": [2]},
        **TOKENS,
        **more,
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def qwen3_vl(**more: Any) -> nn.Module:
    """Learned positions, three levels, one of the last layer."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
    config = transformers.Qwen3VLConfig(
        text_config={**TEXT, "head_dim": 16, "rope_parameters": rope},
        vision_config={
            **VISION,
            "num_position_embeddings": 25,
            "deepstack_visual_indexes": [0, 1, 3],
        },
        **TOKENS,
        **more,
    )
    return transformers.Qwen3VLForConditionalGeneration(config)


MODELS = {"qwen2_5_vl": qwen2_5_vl, "qwen3_vl": qwen3_vl}


def tokens_of(grid: list[int]) -> int:
    """Image tokens of an image."""
    return grid[0] * grid[1] * grid[2] // 4


def pixels(grids: list[list[int]], seed: int) -> Tensor:
    """Patches of images, ``(patches, 96)``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(t * h * w for t, h, w in grids), 96, generator=generator)


def input_ids_of(samples: list[list[list[int]]], length: int) -> Tensor:
    """Samples with the tokens of their images among text: ``(b, length)``."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, END, (len(samples), length), generator=generator)
    for sample, grids in enumerate(samples):
        at = 2 + sample
        for grid in grids:
            stop = at + 1 + tokens_of(grid)
            ids[sample, at], ids[sample, stop] = START, END
            ids[sample, at + 1 : stop] = IMAGE
            at = stop + 3
    return ids


def task(model: nn.Module, length: int = 40) -> harness.Task:
    """A batch of four samples."""
    harness.randomise(model, seed=1, scale=0.15)
    ids = input_ids_of(GRIDS, length)
    flat = [grid for grids in GRIDS for grid in grids]
    generator = torch.Generator().manual_seed(7)
    mask = (torch.rand(ids.shape, generator=generator) < 0.7) & (ids != IMAGE)
    lengths = [length - 3 * (sample % 3) for sample in range(len(ids))]
    for sample, own in enumerate(lengths):
        mask[sample, own - 1 :] = False

    def items(samples: harness.Samples) -> dict[str, Any] | None:
        own = [GRIDS[sample] for sample in samples]
        if not any(own):
            return None
        patches = [pixels(GRIDS[sample], sample) for sample in samples]
        grids = torch.tensor([grid for each in own for grid in each])
        return {TOWER: {"pixel_values": torch.cat(patches), "image_grid_thw": grids}}

    def theirs() -> dict[str, Any]:
        inputs = items(range(len(ids)))[TOWER]
        return {**inputs, "mm_token_type_ids": (ids == IMAGE).int()}

    positions = multimodal_positions(model.config, ids, torch.tensor(flat))
    return harness.Task(model, ids, mask.float(), positions, lengths, {"images": items}, theirs)
