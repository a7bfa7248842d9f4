# SPDX-License-Identifier: Apache-2.0
"""CLIP's, SigLIP's and SigLIP2's towers alone, against transformers: sizes, norms, wrong inputs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import nn

from megatron.core.models.mimo.huggingface.build import BuildOptions, module_config
from megatron.core.models.mimo.huggingface.cuts import Heads
from megatron.core.models.mimo.huggingface.families.vision_towers import TOWER as PREFIX
from megatron.core.models.mimo.huggingface.families.vision_towers import tower_kind
from megatron.core.models.mimo.huggingface.family import UnsupportedModelError
from megatron.core.models.mimo.huggingface.folder import ModelFolder
from megatron.core.models.mimo.huggingface.weights import Part, check, held_by, load
from megatron.core.models.mimo.towers.feature_transformer import Features
from megatron.core.models.mimo.training.groups import create_process_groups, make_grid
from megatron.core.transformer.spec_utils import build_module
from mimo_colocated.launch.layouts import Layout
from tests.unit_tests.mimo.huggingface.harness import GRADIENTS, LOGITS, randomise
from tests.unit_tests.mimo.huggingface.llava_models import SHAPES, SIDE, TOWER, patches

HEADS = Heads(4, 4, 6)


@pytest.fixture(autouse=True)
def _one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _theirs(name: str, **sizes: Any) -> nn.Module:
    config = getattr(transformers, f"{name}VisionConfig")(**TOWER, **sizes)
    return randomise(getattr(transformers, f"{name}VisionModel")(config), seed=1)


def _ours(theirs: nn.Module, features: Features, folder: Path) -> nn.Module:
    """The tower with the weights of theirs."""
    theirs.save_pretrained(folder)
    kind, groups = tower_kind(theirs.config), create_process_groups(make_grid())
    family = kind.family(features)
    config = module_config(family, theirs.config, Layout(), BuildOptions())
    tower = build_module(kind.spec(features, theirs.config)(config, groups))
    table = family.table(theirs.config).spelled({PREFIX: ""})
    part = Part("tower", (tower,), table, groups, HEADS)
    with ModelFolder(folder) as opened:
        held = list(held_by([part]))
        check(held, [part], opened, headers_only=False)
        load(held, opened, lambda _size: None)
    return tower.eval()


def _error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("name", ["CLIP", "Siglip"])
def test_images_of_another_size_have_interpolated_positions(name: str, tmp_path: Path) -> None:
    theirs = _theirs(name, image_size=SIDE)
    ours = _ours(theirs, Features((4,)), tmp_path)
    pixels = torch.randn(2, 3, 20, 8)
    expected = theirs(pixels, interpolate_pos_encoding=True, output_hidden_states=True)
    found = ours(pixels, interpolate_pos_encoding=True)
    assert _error(found, expected.hidden_states[-1]) <= LOGITS
    # The weight of positions has the gradient of what was interpolated.
    weight = theirs.embeddings.position_embedding.weight
    expected.hidden_states[-1].square().sum().backward()
    found.square().sum().backward()
    assert _error(ours.position_embedding.grad, weight.grad) <= GRADIENTS
    # The smallest image is one patch.
    for height, width in ((4, 8), (4, 4)):
        small = {"pixel_values": pixels[..., :height, :width], "interpolate_pos_encoding": True}
        wanted = theirs(**small, output_hidden_states=True).hidden_states[-1]
        assert _error(ours(**small), wanted) <= LOGITS
    with pytest.raises(ValueError, match=r"images have 20 x 8 pixels, .* was made for 12 x 12"):
        ours(pixels)
    with pytest.raises(ValueError, match=r"images have 20 x 3 pixels"):
        ours(pixels[..., :3], interpolate_pos_encoding=True)
    with pytest.raises(ValueError, match=r"must be \(images, 3, height, width\), got \(2, 1, 12"):
        ours(torch.randn(2, 1, SIDE, SIDE))


def test_the_last_norm_is_part_of_a_tower_that_says_so(tmp_path: Path) -> None:
    theirs = _theirs("Siglip", image_size=SIDE)
    ours = _ours(theirs, Features((4,), final_norm=True), tmp_path)
    pixels = torch.randn(2, 3, SIDE, SIDE)
    assert _error(ours(pixels), theirs(pixels).last_hidden_state) <= LOGITS


@pytest.mark.parametrize("features", [Features((4,), final_norm=True), Features((4, 1), 1)])
def test_patches_of_padding_have_no_rows(features: Features, tmp_path: Path) -> None:
    theirs = _theirs("Siglip2", num_patches=16)
    ours = _ours(theirs, features, tmp_path)
    inputs = patches(SHAPES)
    output = theirs(**inputs, output_hidden_states=True)
    if features.final_norm:
        chosen = output.last_hidden_state
    else:
        chosen = torch.cat([output.hidden_states[depth] for depth in features.depths], dim=-1)
    real = [
        image[features.first_row : height * width]
        for image, (height, width) in zip(chosen, SHAPES, strict=True)
    ]
    found, expected = ours(**inputs), torch.cat(real)
    assert found.shape == expected.shape
    assert _error(found, expected) <= LOGITS
    found.square().sum().backward()
    expected.square().sum().backward()
    weight = theirs.embeddings.position_embedding.weight
    assert _error(ours.position_embedding.grad, weight.grad) <= GRADIENTS


def test_patches_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    ours = _ours(_theirs("Siglip2", num_patches=16), Features((4,)), tmp_path)
    inputs = patches([(2, 3), (1, 2)])
    short = inputs["pixel_attention_mask"].clone()
    short[0, 5] = 0
    with pytest.raises(ValueError, match=r"images of \[6, 2\] patches, but .* has \[5, 2\] of 6"):
        ours(**{**inputs, "pixel_attention_mask": short})
    last = inputs["pixel_attention_mask"].flip(1)
    with pytest.raises(ValueError, match=r"must stand first"):
        ours(**{**inputs, "pixel_attention_mask": last})
    with pytest.raises(ValueError, match=r"must be \(images, patches, numbers\)"):
        ours(**{**inputs, "pixel_values": inputs["pixel_values"][:, :4]})


def test_towers_that_are_not_known_and_images_that_are_no_squares_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'dinov2' is not known; known are clip_v"):
        tower_kind(transformers.Dinov2Config())
    config = transformers.CLIPVisionConfig(**TOWER, image_size=(12, 16))
    with pytest.raises(UnsupportedModelError, match=r"image_size=.*must be squares"):
        tower_kind(config).family(Features((4,))).check(config)


@pytest.mark.parametrize("final_norm", [False, True])
def test_hidden_states_in_the_middle_are_before_any_norm(final_norm: bool, tmp_path: Path) -> None:
    """As transformers returns them, whether the last one is normalised or not."""
    theirs = _theirs("Siglip", image_size=SIDE)
    ours = _ours(theirs, Features((4, 1), final_norm=final_norm), tmp_path)
    pixels = torch.randn(2, 3, SIDE, SIDE)
    output = theirs(pixels, output_hidden_states=True)
    last = output.last_hidden_state if final_norm else output.hidden_states[4]
    expected = torch.cat([last, output.hidden_states[1]], dim=-1)
    assert _error(ours(pixels), expected) <= LOGITS


def test_hidden_states_are_counted_as_transformers_does() -> None:
    assert Features.of(-2, layers=24, first_row=1) == Features((23,), 1)
    assert Features.of([-2, 6, 0], layers=24).blocks == [(0, 6), (6, 23)]
    assert Features.of(24, layers=24).layers == 24
    for wrong in (25, -26, []):
        with pytest.raises(ValueError, match=r"hidden states -25 to 24, got"):
            Features.of(wrong, layers=24)
