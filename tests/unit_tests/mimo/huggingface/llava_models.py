# SPDX-License-Identifier: Apache-2.0
"""Tiny LLaVA models, and a batch with 0 to 3 images per sample.

An image is 9 patches, with a class token 10 rows, which 4 TP ranks do not divide. Towers have more
layers than are used, heads of another width than the language model's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tests.unit_tests.mimo.huggingface.harness import Samples, Task, randomise
from tests.unit_tests.mimo.huggingface.models import SIZES, VOCABULARY

IMAGE_TOKEN = 98
SIDE, PATCH = 12, 4
PATCHES = (SIDE // PATCH) ** 2
IMAGES = (1, 0, 3, 2, 1, 1, 0, 2)
"""Of each sample."""
LENGTH = 40
SHAPES = [(2, 3), (3, 3), (1, 4), (4, 2), (3, 2), (2, 2), (5, 2), (2, 3), (1, 1), (3, 3)]
"""Patches of SigLIP2's images."""
TOWER = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "patch_size": PATCH,
}

CLIP_LLAMA: dict[str, Any] = {
    "vision_config": transformers.CLIPVisionConfig(**TOWER, image_size=SIDE),
    "text_config": transformers.LlamaConfig(**SIZES),
}
SIGLIP_QWEN2: dict[str, Any] = {
    "vision_config": transformers.SiglipVisionConfig(**TOWER, image_size=SIDE),
    "text_config": transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "vision_feature_select_strategy": "full",
    "vision_feature_layer": -1,
    "projector_hidden_act": "gelu_pytorch_tanh",
}
MODELS: dict[str, dict[str, Any]] = {
    "clip-llama": CLIP_LLAMA,
    "siglip-qwen2": SIGLIP_QWEN2,
    # Hidden states out of order, the embeddings and one twice; class tokens stay.
    "clip-qwen3": {
        "vision_config": transformers.CLIPVisionConfig(**TOWER, image_size=SIDE),
        "text_config": transformers.Qwen3Config(**SIZES, head_dim=16),
        "vision_feature_layer": [-2, 1, 0, 1],
        "vision_feature_select_strategy": "full",
        "multimodal_projector_bias": False,
    },
    "siglip2-llama": {
        "vision_config": transformers.Siglip2VisionConfig(**TOWER, num_patches=16),
        "text_config": transformers.LlamaConfig(**SIZES),
        "vision_feature_select_strategy": "full",
    },
}
"""Name -> what of LlavaConfig it sets."""


def llava(name: str, **changes: Any) -> nn.Module:
    """A model of :data:`MODELS`, every parameter drawn at random."""
    fields = {"image_token_index": IMAGE_TOKEN, **MODELS[name], **changes}
    config = transformers.LlavaConfig(**fields)
    return randomise(transformers.LlavaForConditionalGeneration(config), seed=1)


def rows_per_image(config: Any) -> int:
    """Rows, and tokens, of an image."""
    rows = PATCHES + (config.vision_config.model_type == "clip_vision_model")
    return rows - (config.vision_feature_select_strategy == "default")


def with_images(rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """``input_ids`` and ``loss_mask`` ``(8, 40)`` of samples with images of so many rows."""
    left = iter(rows)
    generator = torch.Generator().manual_seed(3)
    shape = (len(IMAGES), LENGTH)
    input_ids = torch.randint(0, IMAGE_TOKEN, shape, generator=generator)
    loss_mask = (torch.rand(shape, generator=generator) < 0.7).float()
    for sample, images in enumerate(IMAGES):
        at = 1 + sample
        for own in (next(left) for _ in range(images)):
            input_ids[sample, at : at + own] = IMAGE_TOKEN
            loss_mask[sample, at : at + own] = 0
            at += own  # the next image follows at once
        loss_mask[sample, length_of(sample) - 1 :] = 0
    return input_ids, loss_mask


def length_of(sample: int) -> int:
    """Tokens of a sample that are no padding."""
    return LENGTH - sample % 3


def images_of(samples: Samples) -> slice:
    """Which of all images are those of a replica's samples."""
    return slice(sum(IMAGES[: samples.start]), sum(IMAGES[: samples.stop]))


def llava_task(model: nn.Module) -> Task:
    """The batch for a LLaVA model."""
    if model.config.vision_config.model_type == "siglip2_vision_model":
        return _patches_task(model)
    generator = torch.Generator().manual_seed(4)
    pixels = torch.randn(sum(IMAGES), 3, SIDE, SIDE, generator=generator)
    rows = [rows_per_image(model.config)] * sum(IMAGES)
    return _task(model, rows, {"pixel_values": pixels})


def _task(model: nn.Module, rows: Sequence[int], inputs: dict[str, Tensor]) -> Task:
    input_ids, loss_mask = with_images(rows)

    def items(samples: Samples) -> Any:
        own = {name: tensor[images_of(samples)] for name, tensor in inputs.items()}
        return {"vision": own} if len(own["pixel_values"]) else None

    return Task(
        model,
        input_ids,
        loss_mask,
        torch.arange(LENGTH).expand(len(IMAGES), LENGTH),
        [length_of(sample) for sample in range(len(IMAGES))],
        {"images": items},
        lambda: {"pixel_values": inputs["pixel_values"]},
    )


def _patches_task(model: nn.Module) -> Task:
    inputs = patches(SHAPES)
    lengths = [height * width for height, width in SHAPES]
    _use_real_patches(model, inputs, lengths)
    return _task(model, lengths, inputs)


def patches(shapes: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
    """What SigLIP2's processor returns for images of these shapes; padding is not zero."""
    lengths = torch.tensor([height * width for height, width in shapes])
    generator = torch.Generator().manual_seed(5)
    longest = int(lengths.max())
    return {
        "pixel_values": torch.randn(len(shapes), longest, 3 * PATCH**2, generator=generator),
        "pixel_attention_mask": (torch.arange(longest) < lengths[:, None]).to(torch.int32),
        "spatial_shapes": torch.tensor(shapes),
    }


def _use_real_patches(model: Any, inputs: dict[str, Tensor], lengths: Sequence[int]) -> None:
    """Transformers' LLaVA gives every image as many rows; of padding there are to be none."""

    def image_features(pixel_values: Tensor, **_: Any) -> Any:
        known = {**inputs, "pixel_values": pixel_values}
        output = model.model.vision_tower(**known, output_hidden_states=True)
        hidden = output.hidden_states[model.config.vision_feature_layer]
        real = [image[:length] for image, length in zip(hidden, lengths, strict=True)]
        output.pooler_output = [model.model.multi_modal_projector(rows) for rows in real]
        return output

    model.model.get_image_features = image_features


assert VOCABULARY > IMAGE_TOKEN
assert len(SHAPES) == sum(IMAGES)
