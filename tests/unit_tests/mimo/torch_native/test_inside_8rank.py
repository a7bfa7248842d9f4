# SPDX-License-Identifier: Apache-2.0
"""Torch-native modules inside a ``MimoModel``, against transformers in one process.

Towers have 10 or 9 rows, which 4 TP ranks do not divide; samples have 40 tokens, 0 to 3 images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import nn

from megatron.core.models.mimo.huggingface.build import BuildOptions, from_folder
from megatron.core.models.mimo.huggingface.own_encoders import tower_part
from megatron.core.models.mimo.towers.hugging_face import Rows
from mimo_colocated.launch.layouts import Layout
from tests.harness.backend import own_device
from tests.unit_tests.mimo.huggingface import harness, models
from tests.unit_tests.mimo.huggingface.llava_models import SIDE, TOWER, llava, llava_task

pytestmark = [pytest.mark.ranks(8), pytest.mark.once]

SP = {"sequence_parallel": True}
TP2, TP4 = {"images": Layout(tp=2, dp=4)}, {"images": Layout(tp=4, dp=2)}


@dataclass(frozen=True)
class Inside:
    """A case.

    Attributes:
        model: of ``llava_models``.
        native: names of the torch-native modules.
        language, encoders, settings: as of :class:`.harness.Case`.
        frozen: from transformers' model and from ours to what does not train.
    """

    model: str
    native: tuple[str, ...]
    language: Layout
    encoders: dict[str, Layout]
    settings: dict[str, Any] = field(default_factory=dict)
    frozen: tuple[Callable[[Any], list[nn.Module]], Callable[[Any], list[nn.Module]]] | None = None

    def case(self) -> harness.Case:
        settings = {"torch_native": self.native, **self.settings}
        if self.frozen:
            settings["freeze"] = lambda model: _freeze(self.frozen[1](model))
        return harness.Case(self.language, self.encoders, settings)

    def task(self) -> harness.Task:
        model = llava(self.model)
        if self.frozen:
            _freeze(self.frozen[0](model))
        return llava_task(model)


def _freeze(modules: list[nn.Module]) -> None:
    for module in modules:
        module.requires_grad_(False)


IMAGES, LANGUAGE, BOTH = ("images",), ("language",), ("images", "language")
CASES = {
    "tower TP2 beside Megatron TP2 CP2": Inside(
        "clip-llama", IMAGES, Layout(tp=2, cp=2, dp=2), TP2, SP
    ),
    "tower TP4, fan-out": Inside("clip-qwen3", IMAGES, Layout(dp=8), TP4),
    "tower TP2 beside stages": Inside("siglip-qwen2", IMAGES, Layout(pp=2, cp=2, dp=2), TP2, SP),
    "language TP2 FSDP4 beside Megatron": Inside(
        "clip-llama", LANGUAGE, Layout(tp=2, dp=4), TP2, SP
    ),
    "both, tied, gather": Inside(
        "siglip-qwen2", BOTH, Layout(tp=2, dp=4), TP2, {**SP, "bridge": "gather"}
    ),
    "both, TP4, recomputed": Inside(
        "clip-llama", BOTH, Layout(tp=4, dp=2), TP2, {**SP, "recompute": "full"}
    ),
    "both, language frozen": Inside(
        "clip-qwen3",
        BOTH,
        Layout(tp=2, dp=4),
        TP4,
        SP,
        (
            lambda theirs: [theirs.model.language_model, theirs.lm_head],
            lambda ours: [ours.language_model],
        ),
    ),
    "both, embedding and tower frozen": Inside(
        "clip-llama",
        BOTH,
        Layout(tp=2, dp=4),
        TP2,
        SP,
        (
            lambda theirs: [theirs.model.language_model.embed_tokens, theirs.model.vision_tower],
            lambda ours: [
                ours.language_model.model.get_input_embeddings(),
                ours.modality_submodules["images"].encoders,
            ],
        ),
    ),
}


@pytest.mark.parametrize("name", list(CASES))
def test_logits_and_gradients_are_those_of_transformers(name: str, shared_tmp_path: Path) -> None:
    case = CASES[name]
    built, found = harness.compared(case.task(), case.case(), shared_tmp_path)
    built.destroy()
    assert found.logits <= harness.LOGITS
    assert found.gradient <= harness.GRADIENTS, found.tensor


def test_a_mistake_would_be_seen(shared_tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients that replicas do not add up, and one element of a weight on one rank."""
    case = CASES["tower TP2 beside Megatron TP2 CP2"]
    built, found = harness.compared(case.task(), case.case(), shared_tmp_path)
    task, wrapper = case.task(), built.model.modality_submodules["images"]
    monkeypatch.setattr(wrapper, "finish_grad_sync", lambda **_: None)
    alone = _gradient_error(built, task, shared_tmp_path)
    monkeypatch.undo()
    shards = wrapper.local_shards
    with torch.no_grad():
        weight = shards.get_parameter("encoders.vision.tower.encoder.layers.0.mlp.fc1.weight")
        weight[0, 0] += harness.CHANGE if dist.get_rank() == 1 else 0.0
    changed = _gradient_error(built, task, shared_tmp_path)
    built.destroy()
    assert found.gradient <= harness.GRADIENTS
    assert alone > 0.1
    assert changed > harness.GRADIENTS


def _gradient_error(built: Any, task: harness.Task, scratch: Path) -> float:
    trainer = harness.trainer_of(built, task)
    trainer.gradients(task, 0)
    gradients, error = harness.gradients_of(built), None
    if gradients is not None:
        expected = harness.oracle(task, scratch / "again").gradients
        _, error = harness.worst(harness.gradient_errors(gradients, expected))
    return harness.agreed(error)


def test_a_tower_of_one_s_own_is_split(shared_tmp_path: Path) -> None:
    """CLIP's tower, out of its own folder, beside a language model that knows nothing of it."""
    sizes = {**TOWER, "image_size": SIDE}
    tower = harness.randomise(
        transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**sizes)), seed=2
    )
    if dist.get_rank() == 0:
        models.DENSE["qwen3"]().save_pretrained(shared_tmp_path / "language")
        tower.save_pretrained(shared_tmp_path / "tower")
    dist.barrier()
    rows = Rows(layers=-2, first=1)
    part = tower_part("images", shared_tmp_path / "tower", token_id=98, rows=rows)
    options = BuildOptions(torch_native=["images"])
    layouts = {**TP2, "language": Layout(tp=2, cp=2, dp=2)}
    built = from_folder(shared_tmp_path / "language", layouts, options, encoders=[part])
    wrapper = built.model.modality_submodules["images"]
    pixels = torch.linspace(-1, 1, 2 * 3 * SIDE * SIDE, device=own_device()).view(2, 3, SIDE, SIDE)
    tower.to(pixels.device)
    with torch.no_grad():
        found = wrapper(encoder_inputs={"tower": {"pixel_values": pixels}})
        states = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        expected = wrapper.module.input_projections[0](states).flatten(0, 1)
    places = wrapper.local_shards.places
    cut = places["encoders.tower.tower.encoder.layers.0.mlp.fc1.weight"]
    built.destroy()
    assert cut.cuts == {"tp": 2}
    assert (found - expected).abs().max() <= harness.LOGITS * expected.abs().max()
