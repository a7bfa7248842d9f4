# SPDX-License-Identifier: Apache-2.0
"""LoRA on one process: what it begins as, what it refuses, what it drops."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.core import ModelParallelConfig
from megatron.core.models.mimo.checkpoint.store import CheckpointStore
from megatron.core.models.mimo.huggingface.build import BuildOptions, ImportedModel, from_folder
from megatron.core.models.mimo.huggingface.earlier_run import EarlierRun
from megatron.core.models.mimo.huggingface.family import UnsupportedModelError
from megatron.core.models.mimo.huggingface.folder import FolderError
from megatron.core.models.mimo.huggingface.lora_export import to_adapter_folder
from megatron.core.models.mimo.training.parameter_names import adapted_modules, frozen_parts
from megatron.core.models.mimo.transformer.lora import Adapter, adapt, merge, take_off
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from mimo_colocated.launch.layouts import Layout
from mimo_colocated.launch.lora import Lora
from tests.unit_tests.mimo.huggingface import harness, lora_models, models
from tests.unit_tests.mimo.huggingface.lora_models import LORA

pytestmark = pytest.mark.usefixtures("one_rank")

ONE = Layout()


@pytest.fixture(scope="module")
def task() -> harness.Task:
    return lora_models.text(models.DENSE["qwen2-tied"]())


@pytest.fixture(scope="module")
def folder(task: harness.Task, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model")
    task.model.save_pretrained(place)
    return place


def built(folder: Path, lora: Lora | None, **more: Any) -> ImportedModel:
    return from_folder(folder, {"language": ONE}, BuildOptions(lora=lora, **more))


def logits(model: ImportedModel, task: harness.Task) -> torch.Tensor:
    """Of tokens that there are: those that only fill up the vocabulary are the lowest there is."""
    known = model.composite.language.config.vocab_size
    return harness.logits_of(harness.trainer_of(model, task), task)[..., :known]


def test_it_begins_as_the_same_function_and_only_adapters_train(
    folder: Path, task: harness.Task
) -> None:
    plain = built(folder, None)
    model = built(folder, LORA)
    assert torch.equal(logits(model, task), logits(plain, task))
    trains = {e.name for e in model.named_parameters() if e.parameter.requires_grad}
    assert len(trains) == 2 * 2 * 7
    assert "language.decoder.layers.1.mlp.linear_fc1.lora.up_proj.A" in trains
    assert frozen_parts(model.named_parameters()) == {"language"}
    assert adapted_modules(model.named_parameters()) == {"language"}
    assert adapted_modules(plain.named_parameters()) == set()
    drawn = {each.name: each.adapter.A.detach() for each in model.adapted}
    # As peft draws them, each differently.
    assert all(A.abs().max() <= A.shape[1] ** -0.5 for A in drawn.values())
    assert len({float(A.sum()) for A in drawn.values()}) == len(drawn)
    for each in (plain, model):
        each.destroy()


def test_what_adapters_see_is_dropped_in_training_alone(folder: Path, task: harness.Task) -> None:
    model = built(folder, Lora(rank=3, alpha=5.0, dropout=0.5, targets=lora_models.LLAMA))
    lora_models.give_values(model)
    trainer = harness.trainer_of(model, task)
    assert torch.equal(harness.logits_of(trainer, task), harness.logits_of(trainer, task))
    trainer.model.train()
    first, again = (trainer.gradients(task, 0)[0] for _ in range(2))
    assert first != again
    model.destroy()
    plain = built(folder, LORA)
    lora_models.give_values(plain)
    trainer = harness.trainer_of(plain, task)
    trainer.model.train()
    assert trainer.gradients(task, 0)[0] == trainer.gradients(task, 0)[0]
    plain.destroy()


def test_a_checkpoint_with_adapters_becomes_a_model_with_them_merged(
    folder: Path, task: harness.Task, tmp_path: Path
) -> None:
    """Which may have new ones; without the merge it is the base model."""
    model = built(folder, LORA)
    lora_models.give_values(model)
    trainer = harness.trainer_of(model, task)
    known = model.composite.language.config.vocab_size
    expected = harness.logits_of(trainer, task)[..., :known]
    CheckpointStore(tmp_path, model.layouts()).save(3, model.model, trainer.optimizer)
    model.destroy()
    plain = built(folder, None)
    base = logits(plain, task)
    plain.destroy()
    for lora in (None, replace(LORA, rank=2, targets=["q_proj"])):
        again = built(folder, lora, weights=EarlierRun(tmp_path, 3, LORA))
        found = logits(again, task)
        assert (found - expected).abs().max() <= harness.LOGITS * expected.abs().max()
        assert (found - base).abs().max() > 100 * harness.LOGITS * expected.abs().max()
        frozen = [e for e in again.named_parameters() if not e.parameter.requires_grad]
        assert bool(frozen) is (lora is not None)
        again.destroy()


def test_an_adapter_changes_the_rows_that_it_is_given() -> None:
    """Of those alone its B has rows."""
    layer = column_layer()
    adapter = Adapter(layer, rank=2, scale=3.0, drop=0.5, rows=[1, 4])
    torch.nn.init.normal_(adapter.A)
    torch.nn.init.normal_(adapter.B)
    x = torch.randn(5, 6)
    plain, _ = layer(x)
    adapt(layer, {"k": adapter})
    layer.eval()
    changed, _ = layer(x)
    expected = torch.zeros(5, 8)
    expected[:, [1, 4]] = 3.0 * x @ adapter.A.T @ adapter.B.T
    torch.testing.assert_close(changed - plain, expected)
    merge(layer)
    take_off(layer)
    assert type(layer) is ColumnParallelLinear
    torch.testing.assert_close(layer(x)[0], changed)


def test_adapters_say_which_dim_of_which_matrix_tp_cuts() -> None:
    config = ModelParallelConfig(perform_initialization=False)
    row = RowParallelLinear(
        6, 8, config=config, init_method=torch.nn.init.normal_, bias=False, input_is_parallel=True,
        skip_bias_add=False, tp_group=dist.group.WORLD,
    )  # fmt: skip
    for layer, cuts in ((column_layer(), {"B": 0}), (row, {"A": 1})):
        adapter = Adapter(layer, rank=2, scale=3.0)
        assert adapter.cuts == cuts
        told = {
            key: weight.partition_dim  # type: ignore[attr-defined]
            for key, weight in adapter.named_parameters()
            if getattr(weight, "tensor_model_parallel", False)
        }
        assert told == cuts


def column_layer() -> ColumnParallelLinear:
    config = ModelParallelConfig(perform_initialization=False)
    torch.manual_seed(1)
    group = dist.group.WORLD
    layer = ColumnParallelLinear(
        6, 8, config=config, init_method=torch.nn.init.normal_, bias=False, tp_group=group
    )
    torch.nn.init.normal_(layer.weight)
    return layer


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"targets": ["q_porj"]}, r"'q_porj' names no linear layer of the model; it has down_proj"),
        ({"targets": ["embed_tokens"]}, "names model.embed_tokens, here .* take it out, or out of"),
        ({"targets": ["input_layernorm"]}, "names model.layers.0.input_layernorm, here decoder.l"),
        ({"targets": []}, "lora.targets names none; give names of linear layers, such as"),
        ({"rank": -1}, "lora.rank=-1; it must be at least 1, or 0 for no adapters"),
        ({"alpha": 0.0}, "lora.alpha=0.0; it must be a finite number above 0"),
        ({"dropout": 1.0}, "lora.dropout=1.0; it must be from 0 to below 1"),
    ],
)
def test_what_cannot_have_adapters_is_refused(
    folder: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=said) as caught:
        built(folder, replace(LORA, **changes))
    assert "\n" not in str(caught.value)


def test_layers_that_are_no_parallel_ones_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"here model\..* out of torch_native"):
        built(folder, LORA, torch_native=["language"])
    models.SPARSE["qwen3_moe"]().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"experts\.0\.down_proj, here .* no expert's"):
        built(tmp_path, replace(LORA, targets=["*.experts.*.down_proj"]))


def test_adapters_are_written_where_nothing_is(folder: Path, tmp_path: Path) -> None:
    plain = built(folder, Lora())
    with pytest.raises(UnsupportedModelError, match="the model has no adapters; build it with"):
        to_adapter_folder(plain, tmp_path / "out")
    plain.destroy()
    model = built(folder, replace(LORA, targets=["q_proj"]))
    to_adapter_folder(model, tmp_path / "out")
    assert sorted(each.name for each in (tmp_path / "out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    said = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (said["r"], said["lora_alpha"], said["target_modules"]) == (
        LORA.rank,
        LORA.alpha,
        [f"model.layers.{number}.self_attn.q_proj" for number in range(2)],
    )
    with pytest.raises(FolderError, match="exists; give another folder, or overwrite=True"):
        to_adapter_folder(model, tmp_path / "out")
    to_adapter_folder(model, tmp_path / "out", overwrite=True)
    assert [each.name for each in tmp_path.iterdir()] == ["out"]
    # What is no number is not written in the place of what was.
    before = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    for name, parameter in model.model.named_parameters():
        if parameter.requires_grad and "layers.1" in name:
            parameter.detach()[0, 0] = float("nan")
    with pytest.raises(FolderError, match=r"layers\.1\..* has elements that no rank has, or that"):
        to_adapter_folder(model, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == before
    model.destroy()
