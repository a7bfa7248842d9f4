# SPDX-License-Identifier: Apache-2.0
"""Language models of every family on one process, against transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from megatron.core.models.mimo.huggingface.folder import ModelFolder
from megatron.core.models.mimo.huggingface.language_model import ImportedGPTModel
from megatron.core.models.mimo.huggingface.weights import held_by, load
from mimo_colocated.launch.layouts import Layout
from tests.unit_tests.mimo.huggingface import harness, models

ONE = harness.Case(Layout())
EVERY = {**models.DENSE, **models.SPARSE}
# One weight of each kind of cut, by family that has it.
CONTROLS = [
    ("llama", "linear_qkv.weight", (5, 3)),
    ("llama", "linear_proj.weight", (5, 3)),
    ("llama", "linear_fc1.weight", (5, 3)),
    ("llama", "linear_fc2.weight", (5, 3)),
    ("llama", "output_layer.weight", (5, 3)),
    ("llama", "input_layernorm.weight", (5,)),
    ("qwen2", "linear_qkv.bias", (5,)),
    ("gpt2", "linear_qkv.weight", (5, 3)),
    ("mixtral", "experts.local_experts.1.linear_fc1.weight", (5, 3)),
]


@pytest.fixture(autouse=True)
def _one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("family", EVERY)
def test_logits_and_gradients_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    task = harness.text_task(harness.randomise(EVERY[family](), seed=1), models.VOCABULARY)
    task.model.save_pretrained(tmp_path / "model")
    expected = harness.oracle(task, tmp_path / "gradients")
    built = harness.built_case(tmp_path / "model", ONE)
    trainer = harness.trainer_of(built, task)
    error = harness.logits_error(harness.logits_of(trainer, task), expected, task)
    assert error <= harness.LOGITS
    trainer.model.train()
    loss, _ = trainer.gradients(task, 0)
    assert loss == pytest.approx(expected.loss, rel=1e-6)
    errors = harness.gradient_errors(harness.gradients_of(built), expected.gradients)
    name, error = harness.worst(errors)
    assert error <= harness.GRADIENTS, name
    built.destroy()


@pytest.mark.parametrize(("family", "weight", "at"), CONTROLS)
def test_one_changed_weight_is_noticed(
    family: str, weight: str, at: tuple[int, ...], tmp_path: Path
) -> None:
    task = harness.text_task(harness.randomise(EVERY[family](), seed=1), models.VOCABULARY)
    task.model.save_pretrained(tmp_path / "model")
    expected = harness.oracle(task, tmp_path / "gradients")
    built = harness.built_case(tmp_path / "model", ONE)
    assert harness.change_one(built, weight, at, harness.CHANGE)
    trainer = harness.trainer_of(built, task)
    error = harness.logits_error(harness.logits_of(trainer, task), expected, task)
    assert error > 2 * harness.LOGITS
    trainer.model.train()
    trainer.gradients(task, 0)
    errors = harness.gradient_errors(harness.gradients_of(built), expected.gradients)
    assert harness.worst(errors)[1] > 2 * harness.GRADIENTS
    built.destroy()


def test_padding_of_the_vocabulary_neither_wins_nor_counts(tmp_path: Path) -> None:
    task = harness.text_task(harness.randomise(models.DENSE["llama"](), 1), models.VOCABULARY)
    task.model.save_pretrained(tmp_path / "model")
    built = harness.built_case(tmp_path / "model", ONE)
    with torch.no_grad(), ModelFolder(tmp_path / "model") as folder:
        held = list(held_by(built.parts))
        for each in held:
            each.parameter.fill_(7.0)  # what memory may hold
        load(held, folder, lambda _size: None)
    trainer = harness.trainer_of(built, task)
    logits = harness.logits_of(trainer, task)
    assert logits.shape[-1] == 128
    assert (logits[..., models.VOCABULARY :] == torch.finfo(logits.dtype).min).all()
    trainer.model.train()
    trainer.gradients(task, 0)
    (language,) = built.parts[0].modules
    for weight in (language.output_layer.weight, language.embedding.word_embeddings.weight):
        assert not weight.main_grad[models.VOCABULARY :].any()
        assert not weight.detach()[models.VOCABULARY :].any()
    built.destroy()


@pytest.mark.parametrize(("rank", "width", "real"), [(0, 64, 64), (1, 64, 35), (0, 128, 99)])
def test_padding_begins_after_the_last_token(rank: int, width: int, real: int) -> None:
    """On either rank of TP 2, and where logits are gathered."""
    tp = SimpleNamespace(rank=lambda: rank)
    model = SimpleNamespace(real_vocab_size=99, vocab_size=128)
    model.pg_collection = SimpleNamespace(tp=tp)
    logits = torch.zeros(1, width)
    ImportedGPTModel._mask_padding(model, None, None, (logits, None))
    assert (logits == 0).nonzero()[:, 1].tolist() == list(range(real))


@pytest.mark.parametrize(("family", "first"), [("gpt2", "transformer."), ("qwen2-tied", "model.")])
def test_folders_whose_names_lack_their_first_part(family: str, first: str, tmp_path: Path) -> None:
    """As GPT-2's on the hub, and those of models saved without their output layer."""
    task = harness.text_task(harness.randomise(EVERY[family](), seed=1), models.VOCABULARY)
    task.model.save_pretrained(tmp_path / "model")
    expected = harness.oracle(task, tmp_path / "gradients")
    file = tmp_path / "model" / "model.safetensors"
    tensors = {name.removeprefix(first): each for name, each in load_file(file).items()}
    if family == "gpt2":  # causal masks, as the hub's files have
        tensors |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 64, 64) for layer in range(2)}
    save_file(tensors, file)
    built = harness.built_case(tmp_path / "model", ONE)
    logits = harness.logits_of(harness.trainer_of(built, task), task)
    assert harness.logits_error(logits, expected, task) <= harness.LOGITS
    built.destroy()
