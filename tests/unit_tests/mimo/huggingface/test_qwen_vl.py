# SPDX-License-Identifier: Apache-2.0
"""Qwen2.5-VL and Qwen3-VL on one process, against transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import vision_utils

from megatron.core.models.mimo.huggingface.composites import describe
from megatron.core.models.mimo.huggingface.family import UnsupportedModelError
from megatron.core.models.mimo.huggingface.positions import multimodal_positions
from megatron.core.models.mimo.towers import image_grids
from megatron.core.models.mimo.towers.qwen_vision import QwenVisionShape, runs_of
from mimo_colocated.launch.layouts import Layout
from tests.unit_tests.mimo.huggingface import harness
from tests.unit_tests.mimo.huggingface import qwen_vl_models as qwen

ONE = harness.Case(Layout(), {"images": Layout()})
WHOLE = ["qwen2_5_vl", "qwen3_vl"]
GRIDS = [(1, 4, 6), (2, 2, 4), (1, 8, 8), (3, 6, 10), (1, 2, 2)]
CONTROLS = [
    ("qwen2_5_vl", "runs.1.layers.0.self_attention.linear_qkv.weight", (5, 3)),
    ("qwen2_5_vl", "runs.2.layers.0.mlp.linear_fc1.bias", (5,)),
    ("qwen2_5_vl", "runs.0.layers.1.mlp.linear_fc2.weight", (5, 3)),
    ("qwen2_5_vl", "patch_embedding.weight", (5, 2, 1, 3, 0)),
    ("qwen2_5_vl", "merger.mlp.encoder.linear_fc2.weight", (5, 3)),
    ("qwen3_vl", "merger.mlp.encoder.linear_fc2.weight", (5, 3)),
    ("qwen3_vl", "level_mergers.2.mlp.encoder.linear_fc2.weight", (5, 3)),
    ("qwen3_vl", "position_embedding.weight", (5, 3)),
]


@pytest.fixture
def one_rank() -> Iterator[None]:
    """Process groups of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _errors(folder: Path, task: harness.Task, expected: harness.Oracle, change: Any = None) -> Any:
    built = harness.built_case(folder, ONE)
    if change is not None:
        assert harness.change_one(built, *change, harness.CHANGE)
    trainer = harness.trainer_of(built, task)
    logits = harness.logits_error(harness.logits_of(trainer, task), expected, task)
    trainer.model.train()
    trainer.gradients(task, 0)
    errors = harness.gradient_errors(harness.gradients_of(built), expected.gradients)
    built.destroy()
    return logits, harness.worst(errors)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", WHOLE)
def test_logits_and_gradients_are_those_of_transformers(
    name: str, tied: bool, tmp_path: Path
) -> None:
    task = qwen.task(qwen.MODELS[name](tie_word_embeddings=tied))
    task.model.save_pretrained(tmp_path / "model")
    expected = harness.oracle(task, tmp_path / "gradients")
    logits, (tensor, gradient) = _errors(tmp_path / "model", task, expected)
    assert logits <= harness.LOGITS
    assert gradient <= harness.GRADIENTS, tensor


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(("name", "weight", "at"), CONTROLS)
def test_one_changed_weight_is_noticed(
    name: str, weight: str, at: tuple[int, ...], tmp_path: Path
) -> None:
    task = qwen.task(qwen.MODELS[name]())
    task.model.save_pretrained(tmp_path / "model")
    expected = harness.oracle(task, tmp_path / "gradients")
    logits, (_, gradient) = _errors(tmp_path / "model", task, expected, (weight, at))
    assert logits > 2 * harness.LOGITS
    assert gradient > 2 * harness.GRADIENTS


def _tower(model: nn.Module, folder: Path) -> Any:
    model.save_pretrained(folder)
    built = harness.built_case(folder, ONE)
    (images,) = built.parts[1].modules
    return built, images.encoders[qwen.TOWER]


def _their_rows(model: nn.Module, pixels: Tensor, grids: Tensor) -> Tensor:
    found = model.model.visual(pixels, grid_thw=grids)
    return torch.cat([found.pooler_output, *getattr(found, "deepstack_features", ())], dim=-1)


def _difference(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("name", qwen.MODELS)
def test_a_tower_returns_their_rows_and_levels(name: str, tmp_path: Path) -> None:
    model = harness.randomise(qwen.MODELS[name](), seed=1, scale=0.15)
    built, tower = _tower(model, tmp_path)
    grids = torch.tensor(GRIDS)
    pixels = qwen.pixels([list(grid) for grid in GRIDS], seed=2)
    with torch.no_grad():
        rows, theirs = tower(pixels, grids), _their_rows(model, pixels, grids)
        alone = tower(pixels[:24], grids[:1])
        turned = _their_rows(model, pixels, grids[:, [0, 2, 1]])
    assert rows.shape == theirs.shape
    assert _difference(rows, theirs) <= 2e-6
    # An image sees no other one; turned ones, as many patches, would be other rows.
    assert _difference(alone, theirs[: len(alone)]) <= 2e-6
    assert _difference(turned, theirs) > 1e-3
    built.destroy()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("granularity", ["selective", "full"])
@pytest.mark.parametrize("name", qwen.MODELS)
def test_recomputed_layers_give_the_same_gradients(
    name: str, granularity: str, tmp_path: Path
) -> None:
    model = harness.randomise(qwen.MODELS[name](), seed=1, scale=0.15)
    model.save_pretrained(tmp_path)
    grids, gradients = torch.tensor(GRIDS[:2]), []
    pixels = qwen.pixels([list(grid) for grid in GRIDS[:2]], seed=2)
    for recompute in ("none", granularity):
        case = harness.Case(Layout(), {"images": Layout()}, {"recompute": recompute})
        built = harness.built_case(tmp_path, case)
        (images,) = built.parts[1].modules
        images.train()
        rows = images.encoders[qwen.TOWER](pixels, grids)
        rows.square().sum().backward()
        named = images.named_parameters()
        gradients.append({key: each.main_grad.clone() for key, each in named})
        built.destroy()
    assert all(gradient.any() for gradient in gradients[0].values())
    for key, gradient in gradients[0].items():
        assert torch.equal(gradients[1][key], gradient), key


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(("name", "older"), [("qwen2_5_vl", False), ("qwen3_vl", True)])
def test_names_of_older_and_newer_folders_are_one_model(
    name: str, older: bool, tmp_path: Path
) -> None:
    model = harness.randomise(qwen.MODELS[name](), seed=1)
    model.save_pretrained(tmp_path / "a")
    model.config.save_pretrained(tmp_path / "b")
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    prefixes = {"model.language_model.": "model.", "model.visual.": "visual."}
    if not older:
        prefixes = {theirs: ours for ours, theirs in prefixes.items()}
    renamed = {}
    for key, tensor in tensors.items():
        prefix = next((each for each in prefixes if key.startswith(each)), None)
        other = key if prefix is None else prefixes[prefix] + key.removeprefix(prefix)
        renamed[other] = tensor.contiguous()
    assert set(renamed) != set(tensors)
    save_file(renamed, tmp_path / "b" / "model.safetensors")
    found = []
    for folder in ("a", "b"):
        built = harness.built_case(tmp_path / folder, ONE)
        found.append([p.detach().clone() for part in built.parts for p in _parameters(part)])
        built.destroy()
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def _parameters(part: Any) -> Iterator[Tensor]:
    for module in part.modules:
        yield from module.parameters()


def test_places_of_patches_are_those_of_transformers() -> None:
    grids = torch.tensor(GRIDS)
    places = image_grids.patch_places(GRIDS, 2)
    assert torch.equal(places, vision_utils.get_vision_position_ids(grids, 2))
    bounds = vision_utils.get_vision_cu_seqlens(grids).diff().tolist()
    assert image_grids.frame_lengths(GRIDS) == bounds
    assert image_grids.patch_places([], 2).shape == (0, 2)


@pytest.mark.parametrize("side", [1, 2, 3, 4])
def test_windows_are_those_of_transformers(side: int) -> None:
    grids = torch.tensor(GRIDS)
    order, bounds = vision_utils.get_vision_window_index(grids, 2, side * 8, 4)
    found = image_grids.windows_of(GRIDS, 2, side)
    assert torch.equal(found.order, order)
    assert [4 * length for length in found.lengths] == bounds.diff().tolist()
    assert image_grids.windows_of([], 2, side).lengths == ()


@pytest.mark.parametrize("side", [3, 5, 48])
def test_resampled_positions_are_those_of_transformers(side: int) -> None:
    indices, weights = image_grids.interpolation(GRIDS, 2, side)
    expected = vision_utils.get_vision_interpolation_indices_and_weights(
        torch.tensor(GRIDS), side, align_corners=True, spatial_merge_size=2
    )
    assert torch.equal(indices, expected[0])
    # They take 1 - distance where we take the share, so the last bit may differ.
    torch.testing.assert_close(weights, expected[1], atol=1e-6, rtol=0)
    assert image_grids.interpolation([], 2, side)[0].shape == (0, 4)


def test_an_image_of_one_row_or_column_stands_at_the_first_one() -> None:
    """Along that axis; the corners of the other one are those of the table."""
    side, grids = 5, [(1, 1, 3), (1, 3, 1), (2, 1, 1)]
    indices, weights = image_grids.interpolation(grids, 1, side)
    found = [
        {int(i): float(w) for i, w in zip(*each, strict=True) if w}
        for each in zip(indices, weights, strict=True)
    ]
    columns, rows = [{0: 1.0}, {2: 1.0}, {4: 1.0}], [{0: 1.0}, {10: 1.0}, {20: 1.0}]
    assert found == [*columns, *rows, {0: 1.0}, {0: 1.0}]


@pytest.mark.parametrize("grid", [(0, 2, 4), (1, 0, 4), (1, 2, 0), (-1, 2, 4), (1, -2, -4)])
def test_images_of_nothing_are_refused(grid: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"frames, rows and columns must be positive"):
        image_grids.checked_grids(torch.tensor([(1, 2, 2), grid]), 2, 4)


def test_runs_end_where_layers_differ_and_levels_are_taken() -> None:
    shape = QwenVisionShape((3, 2, 4, 4), 2, 8, window=2, full_layers=(2,), levels=(0, 3))
    runs = [(run.start, run.size, run.windowed, run.level) for run in runs_of(5, shape)]
    assert runs == [
        (0, 1, True, True),
        (1, 1, True, False),
        (2, 1, False, False),
        (3, 1, True, True),
        (4, 1, True, False),
    ]
    with pytest.raises(ValueError, match=r"levels \[0, 3\] must be layers of the tower, 0 to 2"):
        runs_of(3, shape)


@pytest.mark.parametrize("name", qwen.MODELS)
def test_positions_are_those_of_transformers(name: str) -> None:
    model = qwen.MODELS[name]()
    samples = [[[1, 4, 6], [1, 2, 4]], [], [[2, 4, 4]], [[1, 6, 10]]]
    ids = qwen.input_ids_of(samples, 40)
    grids = torch.tensor([grid for each in samples for grid in each])
    mask = torch.ones_like(ids)
    mask[0, :2] = mask[3, -4:] = 0

    def theirs(own: Tensor, images: Tensor | None, real: Tensor | None = None) -> Tensor:
        kinds = (own == qwen.IMAGE).int()
        return model.model.get_rope_index(
            own, mm_token_type_ids=kinds, image_grid_thw=images, attention_mask=real
        )[0]

    found = multimodal_positions(model.config, ids, grids)
    assert torch.equal(found, theirs(ids, grids))
    masked = multimodal_positions(model.config, ids, grids, attention_mask=mask)
    assert torch.equal(masked, theirs(ids, grids, mask))
    text = multimodal_positions(model.config, ids[1:2])
    assert torch.equal(text, torch.arange(40).expand(3, 1, 40))
    # A pack counts each sequence anew, images and all.
    packed = multimodal_positions(
        model.config, ids[:, :38].reshape(1, -1), grids, cu_seqlens=[0, 38, 76, 114, 152]
    )
    assert torch.equal(packed, theirs(ids[:, :38], grids).reshape(3, 1, -1))
    one = multimodal_positions(model.config, ids[:, :38].reshape(1, -1), grids)
    assert not torch.equal(packed, one)


def test_neighbouring_images_are_told_apart() -> None:
    config = qwen.qwen2_5_vl().config
    ids = torch.tensor([[1, *[qwen.IMAGE] * 3, 2]])
    grids = torch.tensor([[1, 2, 4], [1, 2, 2]])
    found = multimodal_positions(config, ids, grids)
    assert found[:, 0].tolist() == [[0, 1, 1, 3, 4], [0, 1, 1, 3, 4], [0, 1, 2, 3, 4]]


@pytest.mark.parametrize(
    ("ids", "grids", "more", "message"),
    [
        ([1, 97], None, {}, r"tokens of videos \(video_token_id=97\)"),
        ([1, 98, 2], None, {}, "more image tokens than image_grid_thw has images"),
        ([1, 98, 2], [[1, 2, 4]], {}, "an image of 2 tokens starts at token 1 .* has 1 for it"),
        ([1, 2], [[1, 2, 2]], {}, "has 1 images, but input_ids have tokens of 0"),
        ([1, 2], None, {"cu_seqlens": [0, 3]}, r"cu_seqlens that end at 3"),
    ],
)
def test_positions_that_do_not_fit_are_refused(
    ids: list[int], grids: Any, more: dict[str, Any], message: str
) -> None:
    images = None if grids is None else torch.tensor(grids)
    with pytest.raises(ValueError, match=message):
        multimodal_positions(qwen.qwen2_5_vl().config, torch.tensor([ids]), images, **more)


@pytest.mark.parametrize(
    ("patches", "width", "grids", "message"),
    [
        (8, 95, [[1, 2, 4]], r"pixel_values must be \(patches, 96\), got \(8, 95\)"),
        (8, 96, [[1, 2, 6]], r"tells of 12 patches, but pixel_values has 8"),
        (6, 96, [[1, 2, 3]], r"has \[1, 2, 3\]; .* multiples of 2"),
        (8, 96, [1, 2, 4], r"image_grid_thw must be \(images, 3\), got \(3,\)"),
    ],
)
@pytest.mark.usefixtures("one_rank")
def test_images_that_do_not_fit_are_refused(
    patches: int, width: int, grids: Any, message: str, tmp_path: Path
) -> None:
    built, tower = _tower(qwen.qwen2_5_vl(), tmp_path)
    with pytest.raises(ValueError, match=message):
        tower(torch.zeros(patches, width), torch.tensor(grids))
    built.destroy()


def test_settings_that_would_be_another_model_are_refused() -> None:
    config = qwen.qwen3_vl().config
    config.vision_config.num_position_embeddings = 24
    with pytest.raises(UnsupportedModelError, match="num_position_embeddings=24 .* no square"):
        describe(config)
    config = qwen.qwen2_5_vl().config
    config.vision_config.patch_size = [4, 4]
    with pytest.raises(UnsupportedModelError, match=r"patch_size=\[4, 4\] is not supported"):
        describe(config)
    config = qwen.qwen2_5_vl().config
    config.vision_config.out_hidden_size = 32
    (part,) = describe(config).encoders
    said = "out_hidden_size is 32, the language model's hidden_size 64; they must be equal"
    with pytest.raises(UnsupportedModelError, match=said):
        part.spec(None, None, 64)


def test_rows_of_each_image_are_known_before_they_are_encoded() -> None:
    shape = QwenVisionShape((3, 2, 4, 4), 2, 8)
    assert shape.rows({"image_grid_thw": torch.tensor(GRIDS)}) == [6, 4, 16, 45, 1]
