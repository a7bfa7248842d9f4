# SPDX-License-Identifier: Apache-2.0
"""Vision models of transformers, built from their configs, as encoders of a modality."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from megatron.core.models.mimo import VisionModalitySubmodules

TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
SIZES = {**TOWER, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
PIXELS = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)}


def clip(with_projection: bool = False) -> nn.Module:
    config = transformers.CLIPVisionConfig(**SIZES, projection_dim=12)
    kind = "CLIPVisionModelWithProjection" if with_projection else "CLIPVisionModel"
    return getattr(transformers, kind)(config).eval()


def siglip() -> nn.Module:
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIZES)).eval()


def qwen() -> nn.Module:
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen2_5_vl

    config = qwen2_5_vl.Qwen2_5_VLVisionConfig(
        depth=1,
        hidden_size=16,
        intermediate_size=32,
        num_heads=2,
        out_hidden_size=16,
        patch_size=4,
        spatial_merge_size=2,
        temporal_patch_size=1,
        window_size=16,
        fullatt_block_indexes=[0],
    )
    return qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel._from_config(config).eval()


@pytest.mark.parametrize(("make", "count"), [(clip, 5), (siglip, 4)])
def test_the_last_hidden_state_of_a_model_output_is_used(make, count):
    encoder = make()
    rows = VisionModalitySubmodules(encoders={"vit": encoder})(encoder_inputs={"vit": PIXELS})
    expected = encoder(**PIXELS).last_hidden_state
    assert expected.shape == (2, count, 16)
    assert torch.equal(rows, expected.flatten(0, 1))
    assert rows.requires_grad


def test_a_field_that_is_named_is_used():
    encoder = clip(with_projection=True)
    inputs = {"vit": PIXELS}
    with pytest.raises(ValueError, match=r"CLIPVisionModelOutput \(image_embeds: tensor \(2, 12"):
        VisionModalitySubmodules(encoders={"vit": encoder})(encoder_inputs=inputs)
    for field in ("image_embeds", "last_hidden_state"):
        named = VisionModalitySubmodules(encoders={"vit": encoder}, encoder_outputs={"vit": field})
        expected = encoder(**PIXELS)[field]
        assert torch.equal(named(encoder_inputs=inputs), expected.reshape(-1, expected.size(-1)))


def test_images_of_different_sizes_beside_another_encoder():
    """Qwen's tower returns merged rows beside those before merging, of images of 16 and 8 patches.

    They stand with CLIP's rows of the same image.
    """
    grid = torch.tensor([[1, 4, 4], [1, 2, 4]])
    patches = {"hidden_states": torch.linspace(-1, 1, 24 * 48).view(24, 48), "grid_thw": grid}
    encoders = {"qwen": qwen(), "vit": clip()}
    inputs = {"qwen": patches, "vit": PIXELS}
    with pytest.raises(ValueError, match="'qwen' returned .*say in the spec which field holds"):
        VisionModalitySubmodules(encoders=encoders)(encoder_inputs=inputs)
    found = VisionModalitySubmodules(
        encoders=encoders,
        encoder_outputs={"qwen": "pooler_output"},
        rows_per_item={"qwen": lambda given: (given["grid_thw"].prod(-1) // 4).tolist()},
    )(encoder_inputs=inputs)
    merged = encoders["qwen"](**patches).pooler_output
    hidden = encoders["vit"](**PIXELS).last_hidden_state
    expected = torch.cat([merged[:4], hidden[0], merged[4:], hidden[1]])
    assert torch.equal(found, expected)
