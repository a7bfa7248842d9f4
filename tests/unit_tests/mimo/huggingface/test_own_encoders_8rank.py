# SPDX-License-Identifier: Apache-2.0
"""A tower of transformers beside a language model on 8 ranks, against transformers' autograd.

At TP 1 such a tower has a replica per rank: rows fan in, or go to as many replicas.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn

from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.models.mimo.huggingface.build import BuildOptions, ImportedModel, from_folder
from megatron.core.models.mimo.huggingface.export import to_folder
from megatron.core.models.mimo.huggingface.family import UnsupportedModelError
from megatron.core.models.mimo.huggingface.own_encoders import (
    TOWER,
    tower_part,
    without_own_encoders,
)
from megatron.core.models.mimo.towers.hugging_face import HuggingFaceEncoder, Rows
from mimo_colocated.launch.layouts import Layout
from tests.unit_tests.mimo.huggingface import harness, models
from tests.unit_tests.mimo.tiny_modules import on_all_ranks

pytestmark = pytest.mark.ranks(8)

TOKEN, BATCH, LENGTH = 98, 8, 16
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
DINO = {**SIZES, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
COUNTS = (4, 2, 3, 1, 4, 4, 2, 3)
"""Rows of each sample's image that are real; its first pixel says so."""
FAN_IN, EQUAL, STAGES = Layout(tp=2, cp=2, dp=2), Layout(dp=8), Layout(tp=2, pp=2, dp=2)


def real_rows(inputs: Mapping[str, Any]) -> Tensor:
    """Which rows are, the class token's among them."""
    counts = inputs["pixel_values"][:, 0, 0, 0].round()
    return torch.arange(5, device=counts.device)[None] <= counts[:, None]


ROWS = Rows(layers=-2, first=1, valid=real_rows)


def task_of(model: nn.Module) -> harness.Task:
    """Text whose samples each have an image of their own number of rows."""
    task = harness.text_task(model, TOKEN, batch=BATCH, length=LENGTH)
    generator = torch.Generator().manual_seed(9)
    pixels = torch.randn(BATCH, 3, 8, 8, generator=generator).to(task.input_ids.device)
    for sample, count in enumerate(COUNTS):
        task.input_ids[sample, 2 : 2 + count] = TOKEN
        pixels[sample, 0, 0, 0] = count
    items = {"images": lambda own: {TOWER: {"pixel_values": pixels[own.start : own.stop]}}}
    task.items, task.lengths = items, [LENGTH] * BATCH
    return task


def built_with(folder: Path, language: Layout, *, frozen: bool) -> ImportedModel:
    plain = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, overlap_grad_reduce=False, check_for_nan_in_grad=False
    )

    def freeze(model: Any) -> None:
        if frozen:
            model.modality_submodules["images"].encoders.requires_grad_(False)

    part = tower_part("images", folder / "tower", token_id=TOKEN, rows=ROWS)
    layouts = {"images": Layout(dp=8), "language": language}
    options = BuildOptions(ddp=plain, freeze=freeze)
    return from_folder(folder / "model", layouts, options, encoders=[part])


def expected_gradients(
    task: harness.Task, tower: nn.Module, projector: nn.Module
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of the language model, and of the tower and the projector, in one process."""
    (inputs,) = task.items["images"](range(BATCH)).values()
    states = tower(**inputs, output_hidden_states=True).hidden_states[-2][:, 1:]
    rows = [projector(states[n, :count]) for n, count in enumerate(COUNTS)]
    language: Any = task.model
    embedded = language.get_input_embeddings()(task.input_ids)
    place = task.input_ids == TOKEN
    embedded = embedded.masked_scatter(place[..., None], torch.cat(rows))
    logits = language(inputs_embeds=embedded).logits
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), task.labels, reduction="none")
    ((losses * task.loss_mask).sum() / task.loss_mask.sum()).backward()
    own = {f"tower.{name}": p.grad for name, p in tower.named_parameters() if p.grad is not None}
    own |= {f"projector.{name}": p.grad for name, p in projector.named_parameters()}
    return {name: p.grad for name, p in language.named_parameters()}, own


def own_modules(built: ImportedModel) -> tuple[HuggingFaceEncoder, nn.Module]:
    modality = built.model.modality_submodules["images"].module
    return modality.encoders[TOWER], modality.input_projections[0]


def own_gradients(built: ImportedModel) -> dict[str, Tensor]:
    encoder, projector = own_modules(built)
    found = {f"tower.{name}": p for name, p in encoder.tower.named_parameters()}
    found |= {f"projector.{name}": p for name, p in projector.named_parameters()}
    return {name: p.main_grad for name, p in found.items() if p.requires_grad}


def folders(place: Path) -> tuple[harness.Task, Any]:
    """A task with a language model, and a tower; both saved below ``place``."""
    task = task_of(harness.randomise(models.DENSE["qwen3"](), seed=1))
    tower = harness.randomise(transformers.Dinov2Model(transformers.Dinov2Config(**DINO)), seed=2)
    if dist.get_rank() == 0:
        task.model.save_pretrained(place / "model")
        tower.save_pretrained(place / "tower")
    dist.barrier()
    return task, tower


@pytest.mark.parametrize(
    ("language", "frozen"), [(FAN_IN, False), (EQUAL, True), (STAGES, False), (FAN_IN, True)]
)
def test_gradients_are_those_of_one_process(
    language: Layout, frozen: bool, shared_tmp_path: Path
) -> None:
    task, tower = folders(shared_tmp_path)
    built = built_with(shared_tmp_path, language, frozen=frozen)
    trainer = harness.trainer_of(built, task)
    trainer.model.train()
    trainer.gradients(task, 0)
    found = harness.gradients_of(without_own_encoders(built))
    projector = nn.Linear(16, 32)
    projector.load_state_dict({n: p.cpu() for n, p in own_modules(built)[1].state_dict().items()})
    of_language, of_encoder = expected_gradients(task, tower, projector)
    if frozen:
        of_encoder = {n: g for n, g in of_encoder.items() if n.startswith("projector.")}
    own = own_gradients(built)
    built.destroy()
    assert own.keys() == of_encoder.keys()
    errors = [harness.worst(harness.gradient_errors(own, of_encoder))]
    if found is not None:
        errors.append(harness.worst(harness.gradient_errors(found, of_language)))
    for tensor, error in sum(on_all_ranks(errors), []):
        assert error <= harness.GRADIENTS, tensor


def test_a_model_with_its_own_tower_is_saved_in_two_parts_and_comes_back(
    shared_tmp_path: Path,
) -> None:
    """The way that the refusal names, after a step: the tower, its projector, and the rest."""
    task, tower = folders(shared_tmp_path)
    built = built_with(shared_tmp_path, FAN_IN, frozen=False)
    trainer = harness.trainer_of(built, task)
    before = harness.logits_of(trainer, task)[..., :TOKEN]
    trainer.model.train()
    trainer.step(task, 0)
    after = harness.logits_of(trainer, task)[..., :TOKEN]
    out = shared_tmp_path / "out"
    with pytest.raises(UnsupportedModelError, match="would be lost: .*without_own_encoders"):
        to_folder(built, out / "model")
    dist.barrier()
    assert not out.exists()
    dist.barrier()
    encoder, projector = own_modules(built)
    if dist.get_rank() == 0:
        encoder.save_pretrained(out / "tower")
        torch.save(projector.state_dict(), out / "projector.pt")
    dist.barrier()
    to_folder(without_own_encoders(built), out / "model")
    built.destroy()
    again = built_with(out, STAGES, frozen=False)
    own_modules(again)[1].load_state_dict(torch.load(out / "projector.pt"))
    found = harness.logits_of(harness.trainer_of(again, task), task)[..., :TOKEN]
    again.destroy()
    limit = harness.LOGITS * after.abs().max()
    assert (after - before).abs().max() > limit
    assert (after - found).abs().max() <= limit
