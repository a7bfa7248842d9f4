# SPDX-License-Identifier: Apache-2.0
"""Towers of transformers as they are: their rows, what trains of them, and a whole model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from megatron.core.models.mimo.huggingface.build import BuildOptions, from_folder
from megatron.core.models.mimo.huggingface.export import to_folder
from megatron.core.models.mimo.huggingface.family import UnsupportedModelError
from megatron.core.models.mimo.huggingface.own_encoders import (
    TOWER,
    tower_part,
    without_own_encoders,
)
from megatron.core.models.mimo.towers.hugging_face import HuggingFaceEncoder, Rows
from mimo_colocated.launch.layouts import Layout
from tests.unit_tests.mimo.huggingface import harness, models, sounds
from tests.unit_tests.mimo.model_stubs import StubGroup

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
PIXELS = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)
CLIP = transformers.CLIPVisionConfig(**SIZES, attention_dropout=0.5)
DINO = transformers.Dinov2Config(**SIZES)


def clip() -> nn.Module:
    return harness.randomise(transformers.CLIPVisionModel(CLIP), seed=1)


def test_hidden_states_and_rows_are_chosen() -> None:
    tower = clip()
    states = tower(PIXELS, output_hidden_states=True).hidden_states
    for rows, expected in (
        (Rows(), tower(PIXELS).last_hidden_state),
        (Rows(layers=-2, first=1), states[-2][:, 1:]),
        (Rows(layers=0, first=1), states[0][:, 1:]),
        (Rows(layers=(0,)), states[0]),
        (Rows(layers=(1, -2)), torch.cat([states[1], states[2]], dim=-1)),
    ):
        encoder = HuggingFaceEncoder(tower, rows)
        assert torch.equal(encoder(pixel_values=PIXELS), expected)
        assert encoder.width == expected.shape[-1]


def test_what_no_row_depends_on_does_not_train() -> None:
    encoder = HuggingFaceEncoder(clip(), Rows(layers=-2))
    assert {name.rpartition(".")[0] for name in encoder.unused} >= {
        "encoder.layers.2.mlp.fc1",
        "post_layernorm",
    }
    encoder(pixel_values=PIXELS).sum().backward()
    trained = {n for n, p in encoder.tower.named_parameters() if p.grad is not None}
    assert trained == {n for n, p in encoder.tower.named_parameters() if p.requires_grad}
    assert trained.isdisjoint(encoder.unused)
    assert "encoder.layers.1.mlp.fc1.weight" in trained


def test_a_frozen_tower_stays_in_eval_mode() -> None:
    """Its attention has dropout, so the mode shows in what it returns."""
    encoder = HuggingFaceEncoder(clip())
    expected = encoder(pixel_values=PIXELS)
    encoder.train()
    assert not torch.equal(encoder(pixel_values=PIXELS), expected)
    encoder.requires_grad_(False)
    assert torch.equal(encoder(pixel_values=PIXELS), expected)
    assert not encoder.tower.training
    encoder.tower.encoder.layers[0].requires_grad_(True)
    encoder(pixel_values=PIXELS)
    assert encoder.tower.training


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    found = {}
    for checkpointing in (False, True):
        tower = clip()
        for layer in tower.encoder.layers:
            layer.self_attn.dropout = 0.0
        encoder = HuggingFaceEncoder(tower, gradient_checkpointing=checkpointing).train()
        calls: list[int] = []
        mlp = tower.encoder.layers[0].mlp
        mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        encoder(pixel_values=PIXELS).square().sum().backward()
        assert len(calls) == 1 + checkpointing
        found[checkpointing] = [p.grad for p in tower.parameters() if p.requires_grad]
    for kept, again in zip(found[False], found[True], strict=True):
        torch.testing.assert_close(kept, again)


class Maps(nn.Module):
    """Returns what it is told to, as an output of transformers."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(float(torch.Size(shape).numel())).view(shape))

    def forward(self, x: torch.Tensor, **_more: Any) -> dict[str, torch.Tensor]:
        return {"last_hidden_state": self.weight, "other": x}


@pytest.mark.parametrize(
    ("order", "shape"),
    [
        ("sbh", (6, 2, 5)),
        ("bchw", (2, 5, 2, 3)),
        ("bhwc", (2, 2, 3, 5)),
        ("nh", (12, 5)),
    ],
)
def test_dims_in_any_order_become_rows(order: str, shape: tuple[int, ...]) -> None:
    tower = Maps(*shape)
    found = HuggingFaceEncoder(tower, Rows(order=order), sample={"x": torch.zeros(1)})(x=None)
    expected = {
        "sbh": lambda t: t.permute(1, 0, 2),
        "bchw": lambda t: t.permute(0, 2, 3, 1).reshape(2, 6, 5),
        "bhwc": lambda t: t.reshape(2, 6, 5),
        "nh": lambda t: t,
    }[order](tower.weight)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("valid", ["mask", lambda inputs: inputs["mask"]])
def test_rows_of_padding_are_left_out(valid: Any) -> None:
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    tower = Maps(2, 4, 5)
    inputs = {"x": torch.zeros(1), "mask": mask}
    encoder = HuggingFaceEncoder(tower, Rows(valid=valid, first=1), sample=inputs)
    first, second = encoder(**inputs)
    assert torch.equal(first, tower.weight[0, 1:2])
    assert torch.equal(second, tower.weight[1, 1:])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (Rows(output="pooled"), "without a tensor 'pooled'; name the field of its rows"),
        (Rows(order="bchw"), r"tensor \(2, 4, 5\), which is not of order 'bchw'.*'bsh', 'sbh'"),
        (Rows(layers=3), "has 0 hidden states, .* and no layers=3"),
        (Rows(valid="mask"), r"valid='mask' must say of each of \(2, 4\) rows .* got a NoneType"),
    ],
)
def test_rows_that_are_not_there_are_refused(rows: Rows, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HuggingFaceEncoder(Maps(2, 4, 5), rows, sample={"x": torch.zeros(1)})


def test_choices_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"order must be one of \['bchw', .*got 'hwc'"):
        Rows(order="hwc")
    with pytest.raises(ValueError, match="flat rows .* first=1 and valid=None cannot be applied"):
        Rows(order="nh", first=1)
    with pytest.raises(ValueError, match="what a Maps takes cannot be told .* give inputs of one"):
        HuggingFaceEncoder(Maps(2, 4, 5))


def test_the_tower_of_a_larger_folder_and_back(tmp_path: Path) -> None:
    """A vision model out of a whole CLIP's folder: its weights, marked as loaded."""
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 1)
    config = transformers.CLIPConfig(vision_config=SIZES, text_config={**text, **ends})
    whole = harness.randomise(transformers.CLIPModel(config), seed=3)
    whole.save_pretrained(tmp_path / "clip")
    encoder = HuggingFaceEncoder(
        tmp_path / "clip", tower_class=transformers.CLIPVisionModel, dtype=torch.bfloat16
    )
    expected = whole.vision_model(PIXELS).last_hidden_state
    found = encoder(pixel_values=PIXELS)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.1)
    assert all(getattr(p, "_is_hf_initialized", False) for p in encoder.parameters())
    encoder.save_pretrained(tmp_path / "vision")
    again = transformers.CLIPVisionModel.from_pretrained(tmp_path / "vision")
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, encoder.tower.get_parameter(name)), name


def test_inputs_are_cast_to_the_tower_s_dtype() -> None:
    """Whisper's encoder, which does not cast them itself, out of a whole Whisper."""
    ends = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
    config = transformers.WhisperConfig(
        **sounds.ENCODER, decoder_layers=1, vocab_size=9, **dict.fromkeys(ends, 1)
    )
    encoder = HuggingFaceEncoder(config, part="encoder", dtype=torch.bfloat16)
    features, _ = sounds.spectra()
    found = encoder(input_features=features)
    assert found.dtype == torch.bfloat16
    assert found.shape == (8, 20, 24)
    assert (encoder.width, encoder.unused) == (24, [])


def test_a_folder_without_the_weights_is_refused(tmp_path: Path) -> None:
    """What no row depends on may be missing, as pooling heads often are."""
    transformers.ViTModel(transformers.ViTConfig(**SIZES)).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["pooler.dense.weight"]
    save_file(tensors, file, {"format": "pt"})
    assert "pooler.dense.weight" in HuggingFaceEncoder(tmp_path).unused
    lost = next(name for name in tensors if name.endswith("1.layernorm_after.bias"))
    del tensors[lost]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match="no weights for 1 parameters .*tower_class"):
        HuggingFaceEncoder(tmp_path)


@pytest.mark.usefixtures("one_rank")
def test_a_tower_beside_a_language_model_is_transformers_own_sum(tmp_path: Path) -> None:
    """Logits of text with an image: transformers' tower, our projector's weights, its model."""
    language = harness.randomise(models.DENSE["qwen3"](), seed=1)
    language.save_pretrained(tmp_path / "language")
    tower = harness.randomise(transformers.Dinov2Model(DINO), seed=2)
    tower.save_pretrained(tmp_path / "tower")
    part = tower_part("images", tmp_path / "tower", token_id=98, rows=Rows(layers=-2, first=1))
    layouts = {"images": Layout(), "language": Layout()}
    options = BuildOptions(
        freeze=lambda m: m.modality_submodules["images"].encoders.requires_grad_(False)
    )
    built = from_folder(tmp_path / "language", layouts, options, encoders=[part])
    modality = built.model.modality_submodules["images"].module
    assert not any(p.requires_grad for p in modality.encoders[TOWER].parameters())
    input_ids = torch.arange(32).view(2, 16)
    input_ids[:, 3:7] = 98
    positions = torch.arange(16).expand(2, 16)
    built.model.eval()
    with torch.no_grad():
        found, _ = built.model(
            input_ids=input_ids,
            position_ids=positions,
            modality_inputs={"images": {TOWER: {"pixel_values": PIXELS}}},
        )
        states = tower(PIXELS, output_hidden_states=True).hidden_states[-2][:, 1:]
        embedded = language.get_input_embeddings()(input_ids)
        embedded[:, 3:7] = modality.input_projections[0](states)
        expected = language(inputs_embeds=embedded).logits
    difference = (found[..., :99] - expected).abs().max()
    assert difference <= harness.LOGITS * expected.abs().max()
    built.destroy()


@pytest.mark.usefixtures("one_rank")
def test_an_export_does_not_lose_the_tower(tmp_path: Path) -> None:
    models.DENSE["qwen3"]().save_pretrained(tmp_path / "language")
    part = tower_part("images", DINO, token_id=98)
    layouts = {"images": Layout(), "language": Layout()}
    built = from_folder(tmp_path / "language", layouts, encoders=[part])
    with pytest.raises(UnsupportedModelError, match="would be lost: .*without_own_encoders"):
        to_folder(built, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    to_folder(without_own_encoders(built), tmp_path / "out")
    before, after = (harness.whole_folder(tmp_path / name) for name in ("language", "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    built.destroy()


def settings(**changes: Any) -> Any:
    """What is read of Megatron's configuration of a modality."""
    known = {"params_dtype": torch.float32, "recompute_granularity": None}
    return SimpleNamespace(**{**known, "sequence_parallel": False, **changes})


@pytest.mark.parametrize("granularity", [None, "selective", "full"])
@pytest.mark.parametrize("asked", [False, True])
def test_a_tower_follows_the_model_s_options(granularity: str | None, asked: bool) -> None:
    """What is given to the tower itself goes before."""
    part = tower_part("images", DINO, token_id=98)
    if asked:
        part = tower_part("images", DINO, token_id=98, gradient_checkpointing=True)
    groups = SimpleNamespace(tp=StubGroup(1), dp=StubGroup(1))
    config = settings(recompute_granularity=granularity, sequence_parallel=True)
    assert part.sequence_parallel
    assert part.native is not None
    whole = part.spec(config, groups, 24).submodules["encoders"][TOWER]
    native = part.native.spec(config, groups, 24, grid=None).submodules["encoders"][TOWER]
    for spec in (whole, native):
        assert spec.params["gradient_checkpointing"] is (asked or granularity == "full")
    assert native.params["sequence_parallel"] is True
    assert "sequence_parallel" not in whole.params


def test_a_tower_that_cannot_compute_again_is_refused() -> None:
    groups = SimpleNamespace(tp=StubGroup(1), dp=StubGroup(1))
    config = settings(recompute_granularity="full")
    part = tower_part("images", DINO, token_id=98, part="embeddings")
    with pytest.raises(UnsupportedModelError, match="Dinov2Embeddings cannot .*=False to keep"):
        part.spec(config, groups, 24)
    kept = tower_part("images", DINO, token_id=98, part="embeddings", gradient_checkpointing=False)
    assert kept.spec(config, groups, 24) is not None


@pytest.mark.parametrize(
    ("rows", "given", "width"),
    [
        (None, None, 16),
        (Rows(layers=-2), None, 16),
        (Rows(layers=(1, 2)), None, 32),
        (Rows(layers=(0, 1, 3), first=1), None, 48),
        (Rows(layers=(1, 2)), 5, 5),
    ],
    ids=str,
)
def test_a_projector_is_as_wide_as_the_rows_of_all_layers(
    rows: Rows | None, given: int | None, width: int
) -> None:
    part = tower_part("images", DINO, token_id=98, rows=rows, width=given)
    groups = SimpleNamespace(tp=StubGroup(1), dp=StubGroup(1))
    spec = part.spec(settings(), groups, 24)
    (projector,) = spec.submodules["input_projections"]
    assert projector.params["in_features"] == width
    assert projector.params["out_features"] == 24


def test_tp_is_refused() -> None:
    part = tower_part("images", DINO, token_id=98)

    class Group:
        def __init__(self, size: int) -> None:
            self.size = lambda: size

    groups = type("Groups", (), {"tp": Group(2), "dp": Group(4)})()
    advice = r"tp=1 and dp=8, or .*torch_native=\['images'\]"
    with pytest.raises(ValueError, match=f"images tp=2: .*not cut over TP.* {advice}"):
        part.spec(None, groups, 32)
