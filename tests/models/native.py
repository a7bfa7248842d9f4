# SPDX-License-Identifier: Apache-2.0
"""Proof models of transformers' own modules, which PyTorch shards: a CLIP tower, a Qwen2."""

from __future__ import annotations

from typing import Any

import torch

from examples.mimo.digits.data import SEQUENCE_LENGTH, VOCABULARY_SIZE
from examples.mimo.digits.images import PATCH_SIDE
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.models.mimo import VisionModalitySubmodules
from megatron.core.models.mimo.torch_native.language_model import TorchNativeLanguageModel
from megatron.core.models.mimo.towers.hugging_face import Rows
from megatron.core.models.mimo.towers.torch_native import TorchNativeEncoder
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from tests.models.encoders import ENCODER

IMAGE_SIDE = 8


class NativeDigitEncoder(TorchNativeEncoder):
    """A CLIP tower over the digits: ``(n, 1, 8, 8)`` -> ``(n, 4, h)``.

    The keys' biases do not train: attention without rotary positions does not depend on them, and
    Adam would step by the rounding of their gradients.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name, parameter in self.tower.named_parameters():
            if name.endswith("k_proj.bias"):
                parameter.requires_grad_(False)

    def forward(self, images: torch.Tensor) -> Any:  # type: ignore[override]
        """Encode images."""
        return super().forward(pixel_values=images)


def tower_spec(
    config: TransformerConfig, groups: ProcessGroupCollection, grid: HyperCommGrid, width: int
) -> ModuleSpec:
    """The modality of images with a CLIP tower of a config's sizes.

    Args:
        config: whose sizes the tower has.
        groups, grid: of the modality.
        width: of the language model.
    """
    import transformers

    tower = transformers.CLIPVisionConfig(
        hidden_size=config.hidden_size,
        intermediate_size=2 * config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_attention_heads,
        num_channels=1,
        image_size=IMAGE_SIDE,
        patch_size=PATCH_SIDE,
    )
    params = {"source": tower, "rows": Rows(first=1), "grid": grid}
    projection = {"in_features": config.hidden_size, "out_features": width}
    return ModuleSpec(
        module=VisionModalitySubmodules,
        params={"pg_collection": groups},
        submodules={
            "encoders": {ENCODER: ModuleSpec(module=NativeDigitEncoder, params=params)},
            "input_projections": [ModuleSpec(module=torch.nn.Linear, params=projection)],
        },
    )


def language_spec(
    config: TransformerConfig, groups: ProcessGroupCollection, grid: HyperCommGrid, tied: bool
) -> ModuleSpec:
    """A Qwen2 of a config's sizes.

    Args:
        config: whose sizes it has.
        groups, grid: of the language model.
        tied: its embedding is its head, too.
    """
    import transformers

    model = transformers.Qwen2Config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=config.hidden_size,
        intermediate_size=config.ffn_hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_query_groups,
        max_position_embeddings=SEQUENCE_LENGTH,
        tie_word_embeddings=tied,
        pad_token_id=None,
    )
    params = {"config": config, "source": model, "grid": grid, "pg_collection": groups}
    return ModuleSpec(module=TorchNativeLanguageModel, params=params)
