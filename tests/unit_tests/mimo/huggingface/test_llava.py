# SPDX-License-Identifier: Apache-2.0
"""LLaVA models on one process, against transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file, save_file

from megatron.core.models.mimo.huggingface.build import BuildOptions, from_folder
from megatron.core.models.mimo.huggingface.export import to_folder
from megatron.core.models.mimo.huggingface.family import UnsupportedModelError
from megatron.core.models.mimo.memory.policy import EncoderMemory
from mimo_colocated.launch.layouts import Layout
from tests.unit_tests.mimo.huggingface import harness
from tests.unit_tests.mimo.huggingface.llava_models import MODELS, llava, llava_task

ONE = Layout()
CONTROLS = {
    "encoders.vision.class_embedding": (5,),
    "encoders.vision.pre_norm.bias": (5,),
    "patch_embedding.weight": (5, 1, 2, 3),
    "position_embedding": (5, 3),
    "blocks.0.layers.2.self_attention.linear_qkv.weight": (5, 3),
    "input_projections.0.encoder.linear_fc1.weight": (5, 3),
    "input_projections.0.encoder.linear_fc2.bias": (5,),
}


@pytest.fixture(autouse=True)
def _one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _case(**settings: Any) -> harness.Case:
    return harness.Case(ONE, {"images": ONE}, settings)


def _errors(
    task: harness.Task, folder: Path, case: harness.Case, change: Any = None
) -> tuple[float, dict[str, float], harness.Oracle]:
    """Errors of logits and, by name, of gradients."""
    expected = harness.oracle(task, folder / "gradients")
    built = harness.built_case(folder / "model", case)
    if change is not None:
        assert harness.change_one(built, *change, harness.CHANGE)
    trainer = harness.trainer_of(built, task)
    error = harness.logits_error(harness.logits_of(trainer, task), expected, task)
    trainer.model.train()
    trainer.gradients(task, 0)
    errors = harness.gradient_errors(harness.gradients_of(built), expected.gradients)
    built.destroy()
    return error, errors, expected


def _saved(folder: Path, name: str, **changes: Any) -> harness.Task:
    task = llava_task(llava(name, **changes))
    task.model.save_pretrained(folder / "model")
    return task


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    task = _saved(tmp_path, name)
    error, errors, _ = _errors(task, tmp_path, _case())
    assert error <= harness.LOGITS
    tensor, error = harness.worst(errors)
    assert error <= harness.GRADIENTS, tensor


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_comes_back_byte_by_byte(name: str, tmp_path: Path) -> None:
    _saved(tmp_path, name)
    built = from_folder(tmp_path / "model", {"images": ONE, "language": ONE})
    to_folder(built, tmp_path / "out")
    before, after = (tmp_path / each / "model.safetensors" for each in ("model", "out"))
    assert load_file(after).keys() == load_file(before).keys()
    assert harness.change_one(built, "layers.0.self_attention.linear_qkv.bias", (1,), 1e-3)
    to_folder(built, tmp_path / "out changed")
    changed = load_file(tmp_path / "out changed" / "model.safetensors")
    theirs = load_file(before)
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in load_file(after).items())
    assert not all(torch.equal(tensor, theirs[key]) for key, tensor in changed.items())
    built.destroy()


def test_an_export_says_which_hidden_states_were_used(tmp_path: Path) -> None:
    _saved(tmp_path, "clip-llama")
    options = BuildOptions(config_fields={"vision_feature_layer": -1})
    built = from_folder(tmp_path / "model", {"images": ONE, "language": ONE}, options)
    to_folder(built, tmp_path / "out")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert config.vision_feature_layer == -1
    assert config.vision_config.num_hidden_layers == 4
    built.destroy()


@pytest.mark.parametrize("weight", CONTROLS)
def test_one_changed_weight_is_noticed(weight: str, tmp_path: Path) -> None:
    task = _saved(tmp_path, "clip-llama")
    error, errors, _ = _errors(task, tmp_path, _case(), (weight, CONTROLS[weight]))
    assert error > 2 * harness.LOGITS
    assert harness.worst(errors)[1] > 2 * harness.GRADIENTS


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_a_frozen_tower_stays_and_what_is_recomputed_is_the_same(
    recompute: str, tmp_path: Path
) -> None:
    task = _saved(tmp_path, "clip-qwen3")

    def freeze(model: Any) -> None:
        model.modality_submodules["images"].encoders.requires_grad_(False)

    _, errors, _ = _errors(task, tmp_path, _case(recompute=recompute))
    assert harness.worst(errors)[1] <= harness.GRADIENTS
    error, errors, expected = _errors(task, tmp_path, _case(recompute=recompute, freeze=freeze))
    frozen = {name: errors.pop(name) for name in list(errors) if name.startswith("vision_tower")}
    assert error <= harness.LOGITS
    assert harness.worst(errors)[1] <= harness.GRADIENTS
    # None of them has a gradient, although theirs have.
    trained = {name for name in frozen if expected.gradients[name].any()}
    assert trained
    assert all(frozen[name] != frozen[name] for name in trained)


def test_frozen_embeddings_do_not_stop_gradients_of_recomputed_layers(tmp_path: Path) -> None:
    task = _saved(tmp_path, "clip-llama")

    def freeze(model: Any) -> None:
        tower = model.modality_submodules["images"].encoders["vision"]
        for name, parameter in tower.named_parameters():
            parameter.requires_grad_(name.startswith("transformer."))

    _, errors, _ = _errors(task, tmp_path, _case(recompute="full", freeze=freeze))
    layers = {name: error for name, error in errors.items() if ".encoder.layers." in name}
    assert len(layers) == 4 * 16
    assert harness.worst(layers)[1] <= harness.GRADIENTS


@pytest.mark.parametrize(
    "policy", [EncoderMemory("recompute", "recompute"), EncoderMemory("offload", offload_from=0)]
)
@pytest.mark.parametrize("name", ["clip-qwen3", "siglip2-llama"])
def test_activations_of_a_tower_may_go_until_backward(
    name: str, policy: EncoderMemory, tmp_path: Path
) -> None:
    task = _saved(tmp_path, name)

    def use(model: Any) -> None:
        model.modality_submodules["images"].use_memory(policy)

    _, errors, _ = _errors(task, tmp_path, _case(freeze=use))
    assert harness.worst(errors)[1] <= harness.GRADIENTS


def test_layers_above_the_feature_layer_are_not_built(tmp_path: Path) -> None:
    task = _saved(tmp_path, "clip-llama")
    built = from_folder(tmp_path / "model", {"images": ONE, "language": ONE})
    names = {name for name, _ in built.model.named_parameters()}
    assert any("blocks.0.layers.2." in name for name in names)
    assert not any("blocks.0.layers.3." in name or "final_layernorm." in name for name in names
                   if "images" in name)  # fmt: skip
    table = built.parts[1].table
    theirs = set(load_file(tmp_path / "model" / "model.safetensors"))
    alone = {n for n in theirs if ".encoder.layers.3." in n or ".post_layernorm." in n}
    assert table.left_alone(theirs) == alone
    assert len(alone) == 16 + 2
    assert task.model.config.vision_feature_layer == -2
    built.destroy()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"vision_tower.": "vision_tower.vision_model."}, "as the hub has them"),
        (
            {
                "language_model.model.": "model.language_model.",
                "language_model.lm_head.": "lm_head.",
                "vision_tower.": "model.vision_tower.",
                "multi_modal_projector.": "model.multi_modal_projector.",
            },
            "as parameters are called",
        ),
    ],
)
def test_names_of_other_versions_are_read(
    before: dict[str, str], after: str, tmp_path: Path
) -> None:
    task = _saved(tmp_path, "clip-llama")
    file = tmp_path / "model" / "model.safetensors"
    renamed = {}
    for name, tensor in load_file(file).items():
        prefix = next((p for p in before if name.startswith(p)), "")
        renamed[before.get(prefix, "") + name.removeprefix(prefix)] = tensor
    assert all(any(name.startswith(new) for name in renamed) for new in before.values()), after
    if "hub" in after:
        renamed["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(10)
    save_file(renamed, file)
    built = harness.built_case(tmp_path / "model", _case())
    trainer = harness.trainer_of(built, task)
    logits = harness.logits_of(trainer, task)
    expected = harness.oracle(task, tmp_path / "gradients")
    assert harness.logits_error(logits, expected, task) <= harness.LOGITS
    built.destroy()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_feature_layer": -7}, r"4 layers has hidden states -5 to 4, got -7"),
        ({"vision_feature_layer": 0}, r"hidden state 0 .* is its embeddings alone"),
        ({"vision_feature_layer": []}, r"vision_feature_layer: .*got \[\]"),
    ],
)
def test_feature_layers_that_are_not_there_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = llava("clip-llama")
    for field, value in changes.items():
        setattr(model.config, field, value)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(UnsupportedModelError, match=message):
        from_folder(tmp_path / "model", {"images": ONE, "language": ONE})
