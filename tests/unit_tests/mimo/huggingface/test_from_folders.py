# SPDX-License-Identifier: Apache-2.0
"""LLaVA models out of a folder per part, against transformers' LLaVA of the same parts."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import nn

from megatron.core.models.mimo.huggingface.build import BuildOptions, ImportedModel
from megatron.core.models.mimo.huggingface.compose import from_folders
from megatron.core.models.mimo.huggingface.export import to_folder
from megatron.core.models.mimo.huggingface.family import UnsupportedModelError
from megatron.core.models.mimo.huggingface.folder import FolderError
from megatron.core.models.mimo.huggingface.weights import held_by
from mimo_colocated.launch.layouts import Layout
from tests.unit_tests.mimo.huggingface import harness, sounds
from tests.unit_tests.mimo.huggingface.llava_models import IMAGE_TOKEN, SIDE, TOWER, llava_task
from tests.unit_tests.mimo.huggingface.models import SIZES

ONE = {"images": Layout(), "language": Layout()}
CLIP_TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 40}


def whole_clip() -> nn.Module:
    """CLIP with its text model and projections."""
    return transformers.CLIPModel(
        transformers.CLIPConfig(
            vision_config={**TOWER, "image_size": SIDE}, text_config=CLIP_TEXT, projection_dim=16
        )
    )


def siglip_alone() -> nn.Module:
    """SigLIP's vision model with its pooling head."""
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**TOWER, image_size=SIDE))


PARTS = {
    "whole CLIP, Llama": (whole_clip, transformers.LlamaForCausalLM, transformers.LlamaConfig, {}),
    "SigLIP alone, tied Qwen2": (
        siglip_alone,
        transformers.Qwen2ForCausalLM,
        transformers.Qwen2Config,
        {"tie_word_embeddings": True},
    ),
}


@pytest.fixture(autouse=True)
def _one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _save(folder: Path, name: str) -> tuple[nn.Module, nn.Module]:
    make, model, config, more = PARTS[name]
    tower = harness.randomise(make(), seed=1)
    language = harness.randomise(model(config(**SIZES, **more)), seed=2)
    tower.save_pretrained(folder / "tower")
    language.save_pretrained(folder / "language")
    return getattr(tower, "vision_model", tower), language


def _built(folder: Path, options: BuildOptions | None = None) -> ImportedModel:
    return from_folders(
        ONE,
        options,
        images=folder / "tower",
        language=folder / "language",
        token_id=IMAGE_TOKEN,
    )


def _theirs(built: ImportedModel, tower: nn.Module, language: nn.Module) -> nn.Module:
    """Transformers' LLaVA of the parts, with the projector that was drawn here."""
    config = transformers.LlavaConfig(**dict(built.source.config))
    model = transformers.LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.lm_head.load_state_dict(language.lm_head.state_dict())
    projector = {}
    for held in held_by(built.parts):
        name = held.source.names[0]
        if name.startswith("multi_modal_projector."):
            projector[name.removeprefix("multi_modal_projector.")] = held.parameter.detach()
    model.model.multi_modal_projector.load_state_dict(projector)
    return model.eval()


@pytest.mark.parametrize("name", PARTS)
def test_parts_and_a_new_projector_are_one_model(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parts = _save(tmp_path, name)
    with caplog.at_level(logging.WARNING):
        built = _built(tmp_path)
    said = [each for each in caplog.messages if "projector is new" in each]
    assert len(said) == 1
    assert str(tmp_path / "language") in said[0]
    task = llava_task(_theirs(built, *parts))
    expected = harness.oracle(task, tmp_path / "gradients")
    trainer = harness.trainer_of(built, task)
    logits = harness.logits_of(trainer, task)
    assert harness.logits_error(logits, expected, task) <= harness.LOGITS
    (projection,) = built.parts[1].modules[0].input_projections
    assert projection.encoder.linear_fc1.weight.detach().std() == pytest.approx(0.02, rel=0.2)
    built.destroy()


@pytest.mark.parametrize("name", PARTS)
def test_the_folder_to_be_has_what_transformers_would_save(name: str, tmp_path: Path) -> None:
    parts = _save(tmp_path, name)
    built = _built(tmp_path)
    theirs = _theirs(built, *parts)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = harness.whole_folder(tmp_path / "theirs")
    with built.source.open() as joined:
        assert {n: list(d.shape) for n, d in joined.tensors.items()} == {
            n: list(tensor.shape) for n, tensor in expected.items()
        }
        assert list(joined.files) == ["model.safetensors"]
        loaded = [n for n in expected if not n.startswith("multi_modal_projector.")]
        assert all(torch.equal(joined.read(n), expected[n]) for n in loaded)
        assert not {"config.json"} & {path.name for path in joined.others().values()}
        kept = {"model_type", "image_token_index", "vision_feature_select_strategy"}
        own = theirs.config.to_dict()
        assert {key: joined.config[key] for key in kept} == {key: own[key] for key in kept}
    built.destroy()


def test_fields_of_the_configuration_may_have_other_values(tmp_path: Path) -> None:
    parts = _save(tmp_path, "whole CLIP, Llama")
    fields = {"vision_feature_layer": [-1, 2], "vision_feature_select_strategy": "full"}
    built = _built(tmp_path, BuildOptions(config_fields=fields))
    task = llava_task(_theirs(built, *parts))
    assert task.model.config.vision_feature_layer == [-1, 2]
    expected = harness.oracle(task, tmp_path / "gradients")
    logits = harness.logits_of(harness.trainer_of(built, task), task)
    assert harness.logits_error(logits, expected, task) <= harness.LOGITS
    built.destroy()
    with pytest.raises(UnsupportedModelError, match=r"config_fields names \['feature_layer'\]"):
        _built(tmp_path, BuildOptions(config_fields={"feature_layer": 1}))


def test_parts_that_do_not_make_a_model_are_refused(tmp_path: Path) -> None:
    _save(tmp_path, "whole CLIP, Llama")
    tower, language = tmp_path / "tower", tmp_path / "language"
    wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"token_id": 99}, ValueError, r"token_id is 99, but the vocabulary .* has 99 entries"),
        ({"images": language}, FolderError, r"language has no tensors of a vision model"),
        ({"language": tmp_path}, FolderError, r"not a Hugging Face model folder"),
    ]
    for given, error, message in wrong:
        arguments = {"images": tower, "language": language, "token_id": IMAGE_TOKEN, **given}
        with pytest.raises(error, match=message):
            from_folders(ONE, **arguments)


def test_the_projector_is_drawn_from_the_seed_that_is_given(tmp_path: Path) -> None:
    _save(tmp_path, "SigLIP alone, tied Qwen2")
    drawn = []
    for seed in (5, 6, 5):
        built = _built(tmp_path, BuildOptions(seed=seed))
        module = built.model.modality_submodules["images"].module
        drawn.append([p.detach().clone() for p in module.input_projections.parameters()])
        built.destroy()
    assert all(torch.equal(*pair) for pair in zip(drawn[0], drawn[2], strict=True))
    weights = [pair for pair in zip(drawn[0], drawn[1], strict=True) if pair[0].dim() == 2]
    assert weights
    assert not any(torch.equal(*pair) for pair in weights)


@pytest.mark.parametrize("name", PARTS)
def test_it_is_exported_as_a_model_that_transformers_reads(name: str, tmp_path: Path) -> None:
    parts = _save(tmp_path, name)
    (tmp_path / "language" / "tokenizer_config.json").write_text("{}")
    (tmp_path / "tower" / "preprocessor_config.json").write_text("{}")
    # Whole CLIP has a tokenizer of its own, for its text model.
    (tmp_path / "tower" / "tokenizer_config.json").write_text('{"of": "CLIP"}')
    built = _built(tmp_path)
    expected = _theirs(built, *parts).state_dict()
    to_folder(built, tmp_path / "out")
    found = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    weights = found.state_dict()
    assert weights.keys() == expected.keys()
    assert [key for key in weights if not torch.equal(weights[key], expected[key])] == []
    there = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "tokenizer_config.json", "preprocessor_config.json"} <= there
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == "{}"


SOUNDS = {"audio": Layout(), "language": Layout()}


def whisper(kind: Any) -> nn.Module:
    ends = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
    config = transformers.WhisperConfig(
        **sounds.ENCODER, decoder_layers=1, vocab_size=9, **dict.fromkeys(ends, 1)
    )
    return harness.randomise(kind(config), seed=1)


@pytest.mark.parametrize("tied", [False, True])
def test_whisper_and_a_language_model_are_a_qwen2_audio(tied: bool, tmp_path: Path) -> None:
    """Against transformers' model of the exported folder, whose parts are those of the folders."""
    kind = "Qwen2" if tied else "Llama"
    made = "WhisperModel" if tied else "WhisperForConditionalGeneration"
    heard = whisper(getattr(transformers, made))
    config = getattr(transformers, f"{kind}Config")(**SIZES, tie_word_embeddings=tied)
    said = harness.randomise(getattr(transformers, f"{kind}ForCausalLM")(config), seed=2)
    heard.save_pretrained(tmp_path / "whisper")
    said.save_pretrained(tmp_path / "language")
    built = from_folders(
        SOUNDS,
        audio=tmp_path / "whisper",
        language=tmp_path / "language",
        token_id=sounds.TOKEN,
    )
    to_folder(built, tmp_path / "out")
    task = sounds.task()
    task.model = transformers.Qwen2AudioForConditionalGeneration.from_pretrained(tmp_path / "out")
    theirs = task.model.eval().state_dict()
    for module in (heard.get_encoder(), said):
        for name, tensor in module.state_dict().items():
            named = [own for own in theirs if own.endswith(name)]
            assert any(torch.equal(theirs[own], tensor) for own in named), name
    expected = harness.oracle(task, tmp_path / "gradients")
    logits = harness.logits_of(harness.trainer_of(built, task), task)
    assert harness.logits_error(logits, expected, task) <= harness.LOGITS
    built.destroy()


def test_towers_that_no_format_joins_are_refused(tmp_path: Path) -> None:
    _save(tmp_path, "whole CLIP, Llama")
    given = {"language": tmp_path / "language", "token_id": IMAGE_TOKEN}
    tower = tmp_path / "tower"
    with pytest.raises(ValueError, match="LLaVA and Qwen2-Audio have one tower; give one of"):
        from_folders(ONE, **given)
    with pytest.raises(ValueError, match="LLaVA and Qwen2-Audio have one tower; give one of"):
        from_folders(ONE, **given, images=tower, audio=tower)
    with pytest.raises(FolderError, match="tower has no tensors of Whisper's encoder; give a"):
        from_folders(SOUNDS, **given, audio=tower)
    sizes = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 9}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    other = transformers.BartModel(transformers.BartConfig(**sizes, **heads))
    other.save_pretrained(tmp_path / "bart")
    with pytest.raises(UnsupportedModelError, match="bart is a bart, not a Whisper; another tower"):
        from_folders(SOUNDS, **given, audio=tmp_path / "bart")
