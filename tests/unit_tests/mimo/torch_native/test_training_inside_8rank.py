# SPDX-License-Identifier: Apache-2.0
"""Steps of torch-native modules in a ``MimoModel``: weights, norm, skipped steps, checkpoints."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor

from megatron.core.models.mimo.checkpoint.store import CheckpointStore
from megatron.core.models.mimo.gradients.finalize import iter_modules
from megatron.core.models.mimo.huggingface.build import ImportedModel
from megatron.core.models.mimo.huggingface.export import to_folder
from mimo_colocated.launch.layouts import Layout
from tests.unit_tests.mimo.huggingface import harness
from tests.unit_tests.mimo.huggingface.llava_models import llava, llava_task
from tests.unit_tests.mimo.tiny_modules import on_all_ranks

pytestmark = pytest.mark.ranks(8)

STEPS = 2
BOTH = {"torch_native": ("images", "language")}
# In either microbatch some replica of the tower has no image.
NATIVE = harness.Case(
    Layout(tp=2, dp=4), {"images": Layout(tp=2, dp=4)}, {**BOTH, "sequence_parallel": True}
)
OTHER = harness.Case(Layout(cp=4, dp=2), {"images": Layout(tp=4, dp=2)}, BOTH)
MEGATRON = harness.Case(Layout(tp=2, cp=2, dp=2), {"images": Layout(tp=2, dp=4)})
CHANGE = 1e-3
"""Bound of the norm of an error over the norm of a weight's change: Adam divides by gradients of
which the smallest are rounding."""


class Halves(harness.HarnessTrainer):
    """Two microbatches a step."""

    half = 0

    def samples(self, module: str) -> range:
        whole = super().samples(module)
        middle = len(whole) // 2
        return whole[middle:] if self.half else whole[:middle]

    def microbatches(self, data: harness.Task, step: int) -> Iterator[Mapping[str, Any]]:
        for self.half in range(2):
            yield self.inputs(data, training=True)


def trainer_of(built: ImportedModel) -> Halves:
    options = harness.TrainOptions(
        steps=10, global_batch_size=8, micro_batches=2, warmup_steps=0, clip_grad=0.05
    )
    return Halves(built, options, distributed_optimizer=False)


def transformers_steps(task: harness.Task, rates: list[float]) -> list[float]:
    """Train the task's model in place, unsharded; the gradient norms of the steps."""
    model, norms = task.model, []
    for parameter in model.parameters():
        parameter.grad = None
    named = dict(model.named_parameters())
    kinds = [[p for p in named.values() if (p.ndim > 1) is decays] for decays in (True, False)]
    groups = [
        {"params": kinds[0], "weight_decay": 0.01},
        {"params": kinds[1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    for rate in rates:
        for group in optimizer.param_groups:
            group["lr"] = rate
        logits = model(input_ids=task.input_ids, **task.theirs()).logits.float()
        losses = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), task.labels, reduction="none"
        )
        optimizer.zero_grad()
        ((losses * task.loss_mask).sum() / task.loss_mask.sum()).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)))
        optimizer.step()
    return norms


def changes(before: Path, after: Path) -> dict[str, Tensor]:
    first, last = harness.whole_folder(before), harness.whole_folder(after)
    return {name: last[name] - tensor for name, tensor in first.items()}


def change_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[str, float]:
    """The worst error; the keys' bias of a tower has no gradient but rounding."""
    errors = {
        name: float((found[name] - change).norm() / (change.norm() or 1.0))
        for name, change in expected.items()
        if not (name.startswith("vision_tower.") and name.endswith("k_proj.bias"))
    }
    return harness.worst(errors)


def weights(built: ImportedModel) -> list[Tensor]:
    modules = (module for _, module in iter_modules(built.model))
    return [p.detach().clone() for module in modules for p in module.local_shards.parameters()]


def poisoned_step(trainer: Halves, task: harness.Task) -> None:
    """An inf in one element on one rank skips the step on all, which learn whose it is."""
    before = weights(trainer.built)
    trainer.model.zero_grad_buffer()
    trainer.optimizer.zero_grad()
    trainer.gradients(task, STEPS)
    shards = trainer.model.language_model.local_shards
    if dist.get_rank() == 5:
        shards.get_parameter("model.model.layers.1.mlp.down_proj.weight").main_grad[0, 0] = math.inf
    outcomes = on_all_ranks(trainer.optimizer.step())
    optimizer = trainer.optimizer
    told = on_all_ranks((optimizer.nonfinite_modules, optimizer.nonfinite_gradients))
    assert outcomes == [(False, None, None)] * 8
    assert all(each == told[0] for each in told)
    (broken,) = told[0][1]
    assert (broken.rank, broken.module) == (5, "language")
    assert broken.parameters == ("language_model.model.model.layers.1.mlp.down_proj.weight",)
    assert all(map(torch.equal, before, weights(trainer.built)))


def store_of(built: ImportedModel, folder: Path) -> CheckpointStore:
    return CheckpointStore(folder / "checkpoints", built.layouts(), built.randomness)


def test_steps_checkpoints_and_exports(shared_tmp_path: Path) -> None:
    """Two steps; a checkpoint of the first goes on in another layout; the export is Megatron's."""
    folder, task = shared_tmp_path, llava_task(llava("clip-llama"))
    if dist.get_rank() == 0:
        task.model.save_pretrained(folder / "model")
    dist.barrier()
    built = harness.built_case(folder / "model", NATIVE)
    trainer = trainer_of(built)
    store = store_of(built, folder)
    results = []
    for step in range(STEPS):
        results.append(trainer.step(task, step))
        if step == 0:
            store.save(1, built.model, trainer.optimizer)
            # On the same rank, which must change nothing.
            trainer.optimizer.load_state_dict(copy.deepcopy(trainer.optimizer.state_dict()))
    to_folder(built, folder / "native")
    poisoned_step(trainer, task)
    built.destroy()
    goes_on_elsewhere(task, folder)
    problem = None
    if dist.get_rank() == 0:
        problem = compared_with_transformers(copy.deepcopy(task), results, folder)
    assert harness.agreed(problem) is None
    assert logits_of_megatron(task, folder) <= harness.LOGITS


def compared_with_transformers(task: harness.Task, results: list[Any], folder: Path) -> str | None:
    norms = transformers_steps(task, [each.learning_rate for each in results])
    task.model.save_pretrained(folder / "expected")
    expected = changes(folder / "model", folder / "expected")
    name, error = change_error(changes(folder / "model", folder / "native"), expected)
    off = max(abs(each.grad_norm / norm - 1) for each, norm in zip(results, norms, strict=True))
    clipped = min(norms) > 0.05
    # On the CPU, as what is read from files.
    nothing = dict.fromkeys(expected, torch.zeros((), device="cpu"))
    again, resumed = change_error(changes(folder / "native", folder / "other"), nothing)
    # Without the second step, which a run that did not go on would miss.
    _, control = change_error(nothing, expected)
    right = error <= CHANGE and off <= 1e-5 and clipped and resumed <= 1e-5 < CHANGE < control
    return None if right else f"{name} {error}, norm {off}, {again} {resumed}, {control}"


def goes_on_elsewhere(task: harness.Task, folder: Path) -> None:
    built = harness.built_case(folder / "model", OTHER)
    trainer = trainer_of(built)
    store_of(built, folder).load(1, built.model, trainer.optimizer)
    trainer.resume_schedule(1)
    trainer.step(task, 1)
    to_folder(built, folder / "other")
    built.destroy()


def logits_of_megatron(task: harness.Task, folder: Path) -> float:
    """The error of Megatron's layers with the exported weights, against transformers with them."""
    built = harness.built_case(folder / "native", MEGATRON)
    logits = harness.logits_of(harness.trainer_of(built, task), task)
    built.destroy()
    error = None
    if dist.get_rank() == 0:
        model = transformers.LlavaForConditionalGeneration.from_pretrained(folder / "native")
        with torch.no_grad():
            expected = model.eval()(input_ids=task.input_ids, **task.theirs()).logits
        error = harness.logits_error(logits, harness.Oracle(expected, {}, 0.0), task)
    return harness.agreed(error)
