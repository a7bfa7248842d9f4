# SPDX-License-Identifier: Apache-2.0
"""Qwen2-Audio and Whisper's encoder on one process, against transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file, save_file

from megatron.core.models.mimo.huggingface import build, weights
from megatron.core.models.mimo.huggingface.composites import describe
from megatron.core.models.mimo.huggingface.cuts import Heads
from megatron.core.models.mimo.huggingface.families import whisper
from megatron.core.models.mimo.huggingface.family import UnsupportedModelError
from megatron.core.models.mimo.huggingface.folder import ModelFolder
from megatron.core.models.mimo.towers.whisper import WhisperEncoder, rows_per_sound, sinusoids
from megatron.core.models.mimo.training.groups import create_process_groups, make_grid
from megatron.core.transformer.transformer_config import TransformerConfig
from mimo_colocated.launch.layouts import Layout
from tests.unit_tests.mimo.huggingface import harness, sounds

ONE = harness.Case(Layout(), {"audio": Layout()})
CONTROLS = [
    ("conv1.weight", (5, 3, 1)),
    ("position_embedding", (3, 2)),
    ("layers.1.self_attention.linear_qkv.weight", (5, 3)),
    ("linear_qkv.bias", (1,)),
    ("layers.2.mlp.linear_fc2.bias", (7,)),
    ("layer_norm.bias", (7,)),
    ("audio.input_projections.0.bias", (7,)),
]


@pytest.fixture(autouse=True)
def _one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def proof(tmp_path_factory: pytest.TempPathFactory) -> tuple[harness.Task, harness.Oracle, Path]:
    """A task, what transformers has to say of it, and the model's folder."""
    folder, task = tmp_path_factory.mktemp("qwen2_audio"), sounds.task()
    task.model.save_pretrained(folder / "model")
    return task, harness.oracle(task, folder / "gradients"), folder / "model"


def errors(
    built: build.ImportedModel, task: harness.Task, expected: harness.Oracle
) -> tuple[float, tuple[str, float]]:
    """Of the logits, and the worst one of the gradients."""
    trainer = harness.trainer_of(built, task)
    of_logits = harness.logits_error(harness.logits_of(trainer, task), expected, task)
    trainer.model.train()
    trainer.gradients(task, 0)
    found = harness.gradient_errors(harness.gradients_of(built), expected.gradients)
    return of_logits, harness.worst(found)


def test_logits_and_gradients_are_those_of_transformers(proof) -> None:
    task, expected, folder = proof
    built = harness.built_case(folder, ONE)
    of_logits, (name, of_gradients) = errors(built, task, expected)
    assert of_logits <= harness.LOGITS
    assert of_gradients <= harness.GRADIENTS, name
    built.destroy()


@pytest.mark.parametrize(("weight", "at"), CONTROLS)
def test_one_changed_weight_is_noticed(weight: str, at: tuple[int, ...], proof) -> None:
    task, expected, folder = proof
    built = harness.built_case(folder, ONE)
    assert harness.change_one(built, weight, at, harness.CHANGE)
    of_logits, (_, of_gradients) = errors(built, task, expected)
    assert of_logits > 2 * harness.LOGITS
    assert of_gradients > 2 * harness.GRADIENTS
    built.destroy()


def test_keys_have_no_bias_before_and_after_training(proof) -> None:
    task, _, folder = proof
    built = harness.built_case(folder, ONE)
    trainer = harness.trainer_of(built, task)
    (encoder,) = built.model.modality_submodules["audio"].module.encoders.values()
    biases = [
        layer.self_attention.linear_qkv.bias for layer in encoder.transformer.blocks[0].layers
    ]
    before = [bias.detach().clone() for bias in biases]
    positions = encoder.position_embedding.detach().clone()
    for step in range(2):
        trainer.step(task, step)
    for bias, old in zip(biases, before, strict=True):
        heads = bias.detach().unflatten(0, (-1, 3, 6))
        assert not heads[:, 1].any()
        moved = (bias.detach() - old).unflatten(0, (-1, 3, 6)).abs()
        assert (moved[:, 0] > 0).all()
        assert (moved[:, 2] > 0).all()
    assert torch.equal(encoder.position_embedding, positions)
    built.destroy()


def test_both_spellings_of_a_folder_are_read(proof, tmp_path: Path) -> None:
    """As transformers writes folders, and as it names parameters."""
    task, expected, folder = proof
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    tensors = {name: p.detach().clone() for name, p in task.model.named_parameters()}
    assert not set(tensors) & set(load_file(folder / "model.safetensors"))
    save_file(tensors, tmp_path / "model.safetensors")
    built = harness.built_case(tmp_path, ONE)
    trainer = harness.trainer_of(built, task)
    found = harness.logits_of(trainer, task)
    assert harness.logits_error(found, expected, task) <= harness.LOGITS
    built.destroy()


@pytest.mark.parametrize(
    ("where", "settings", "message"),
    [
        ("audio_config", {"encoder_layerdrop": 0.1}, "encoder_layerdrop=0.1.*left out at random"),
        ("audio_config", {"activation_dropout": 0.1}, "activation_dropout=0.1.*within the MLP"),
        ("audio_config", {"activation_function": "mish"}, "activation 'mish' is not supported"),
        ("text_config", {"sliding_window": 8, "use_sliding_window": True}, "sliding_window=8"),
        ("text_config", {"model_type": "gemma2"}, "model_type 'gemma2' is not known"),
    ],
)
def test_settings_that_would_change_the_result_are_refused(
    where: str, settings: dict[str, Any], message: str, proof, tmp_path: Path
) -> None:
    config = json.loads((proof[2] / "config.json").read_text())
    config[where] |= settings
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((proof[2] / "model.safetensors").read_bytes())
    with pytest.raises(UnsupportedModelError, match=message):
        build.from_folder(tmp_path, ONE.layouts)


def test_the_output_layer_is_never_tied(proof) -> None:
    """Transformers' Qwen2-Audio has one of its own, whatever the text model's config says."""
    config = transformers.AutoConfig.from_pretrained(proof[2])
    config.text_config.tie_word_embeddings = True
    assert not describe(config).language.config.tie_word_embeddings
    assert config.text_config.tie_word_embeddings


def whisper_tower(folder: Path, pooled: bool = False) -> tuple[WhisperEncoder, Any]:
    """A tower with the weights of a folder, and transformers' encoder that the folder is of."""
    config = transformers.WhisperConfig(
        **sounds.ENCODER,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=8,
        vocab_size=9,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 1),
        decoder_start_token_id=1,
    )
    theirs = harness.randomise(transformers.WhisperModel(config), seed=2)
    theirs.save_pretrained(folder)
    groups = create_process_groups(make_grid())
    settings = TransformerConfig(**whisper.settings(config), perform_initialization=False)
    ours = WhisperEncoder(settings, groups, sounds.BINS, sounds.POSITIONS, pooled)
    heads = Heads(4, 4, 6)
    with ModelFolder(folder) as opened:
        part = weights.Part("audio", (ours,), whisper.table("", "encoder."), groups, heads)
        weights.load(list(weights.held_by([part])), opened, lambda _size: None)
    return ours, theirs.encoder


def test_whisper_s_encoder_alone(tmp_path: Path) -> None:
    ours, theirs = whisper_tower(tmp_path)
    features, _ = sounds.spectra()
    found, expected = ours.eval()(features), theirs(features).last_hidden_state
    assert found.shape == (8 * 20, 24)
    assert (found - expected.flatten(0, 1)).abs().max() <= 1e-5 * expected.abs().max()


def test_rows_are_of_real_steps_and_do_not_depend_on_the_others(tmp_path: Path) -> None:
    ours, _ = whisper_tower(tmp_path, pooled=True)
    features, mask = sounds.spectra()
    rows = ours.eval()(features, mask)
    counts = [10, 3, 6, 0, 8, 4, 2, 8]
    inputs = {"input_features": features, "feature_attention_mask": mask}
    assert rows_per_sound(inputs, pooled=True) == counts
    assert rows_per_sound(inputs, pooled=False) == [20, 7, 13, 1, 16, 9, 4, 17]
    assert rows_per_sound({"input_features": features}, pooled=True) == [10] * 8
    assert len(rows) == sum(counts)
    for sound, own in enumerate(rows.split(counts)):
        alone = ours(features[[sound]], mask[[sound]])
        torch.testing.assert_close(alone, own, rtol=1e-5, atol=1e-5)


def test_frames_are_dropped_in_training_only(tmp_path: Path) -> None:
    ours, _ = whisper_tower(tmp_path)
    features, _ = sounds.spectra()
    expected = ours.eval()(features)
    ours.config.hidden_dropout = 0.5
    assert torch.equal(ours(features), expected)
    assert not torch.allclose(ours.train()(features), expected)


def test_positions_that_no_folder_has_are_whisper_s() -> None:
    config = transformers.WhisperConfig(
        **sounds.ENCODER, decoder_layers=1, vocab_size=9, pad_token_id=1
    )
    expected = transformers.WhisperModel(config).encoder.embed_positions.weight
    torch.testing.assert_close(sinusoids(20, 24), expected)


@pytest.mark.parametrize(
    ("features", "mask", "message"),
    [
        ((2, 10, 39), (2, 40), r"input_features must be \(sounds, 10, 40\), got \(2, 10, 39\)"),
        ((2, 9, 40), (2, 40), r"input_features must be \(sounds, 10, 40\), got \(2, 9, 40\)"),
        ((2, 10, 40), (2, 20), r"feature_attention_mask must be \(2, 40\).*got \(2, 20\)"),
        ((2, 10, 40), (3, 40), r"feature_attention_mask must be \(2, 40\).*got \(3, 40\)"),
    ],
)
def test_inputs_of_another_shape_are_refused(
    features: tuple[int, ...], mask: tuple[int, ...], message: str, tmp_path: Path
) -> None:
    ours, _ = whisper_tower(tmp_path)
    with pytest.raises(ValueError, match=message):
        ours(torch.zeros(features), torch.ones(mask))
