# SPDX-License-Identifier: Apache-2.0
"""Adapters with values, and what peft makes of them on the whole model in one process."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.core.models.mimo.huggingface.build import ImportedModel
from megatron.core.models.mimo.huggingface.export import to_folder
from megatron.core.models.mimo.huggingface.lora_export import (
    assembled,
    everywhere,
    merged,
    module_paths,
    to_adapter_folder,
)
from mimo_colocated.launch.lora import Lora
from tests.unit_tests.mimo.huggingface import harness
from tests.unit_tests.mimo.huggingface.models import VOCABULARY

LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA = Lora(rank=3, alpha=5.0, targets=LLAMA)


def give_values(built: ImportedModel) -> None:
    """Draw every B, the same in any layout: adapters that change something."""
    for each in built.adapted:
        generator = torch.Generator().manual_seed(zlib.crc32(each.seed_name.encode()))
        each.write("B", torch.randn(each.shape("B"), generator=generator) * 0.2)


def with_peft(model: nn.Module, folder: Path) -> Any:
    """The model with a folder's adapters; what peft would only warn of is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*")
        return peft.PeftModel.from_pretrained(model, folder, is_trainable=True).eval()


def by_peft(task: harness.Task, folder: Path) -> harness.Oracle:
    """Logits, loss and the gradients of A and B, under the names of the file."""
    model = with_peft(task.model, folder)
    logits = model(input_ids=task.input_ids, **task.theirs()).logits.float()
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), task.labels, reduction="none")
    loss = (losses * task.loss_mask).sum() / task.loss_mask.sum()
    loss.backward()
    gradients = {
        name.replace(".default", ""): weight.grad
        for name, weight in model.named_parameters()
        if weight.grad is not None
    }
    return harness.Oracle(logits.detach(), gradients, loss.item())


def gradients_of(built: ImportedModel) -> dict[str, Tensor] | None:
    """The gradients of A and B under the folder's names, whole, on rank 0."""
    return assembled(
        piece
        for each in built.adapted
        for key in "AB"
        for piece in each.pieces(key, of=getattr(each.adapter, key).main_grad)
    )


def errors(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], paths: Mapping[str, str]
) -> dict[str, float]:
    """By name, the norm of the difference over the norm; ``paths`` are transformers' names."""
    theirs = {}
    for name, value in found.items():
        layer, _, key = name.rpartition(".lora_")
        theirs[f"base_model.model.{paths[layer]}.lora_{key}"] = value
    assert theirs.keys() == expected.keys()
    return {
        name: ((theirs[name] - value).norm() / value.norm()).item()
        for name, value in expected.items()
    }


def compared(
    task: harness.Task, case: harness.Case, folder: Path, lora: Lora
) -> dict[str, float | str]:
    """Errors of a model with adapters against peft, and of its exports; all ranks together."""
    if dist.get_rank() == 0:
        task.model.save_pretrained(folder / "model")
    dist.barrier()
    built = harness.built_case(
        folder / "model", replace(case, settings={**case.settings, "lora": lora})
    )
    give_values(built)
    before = {each.name: each.parameter.detach().clone() for each in built.named_parameters()}
    to_adapter_folder(built, folder / "adapter")
    trainer = harness.trainer_of(built, task)
    with merged(built):
        to_folder(built, folder / "merged")
    kept = all(torch.equal(before[e.name], e.parameter.detach()) for e in built.named_parameters())
    logits = harness.logits_of(trainer, task)
    trainer.model.train()
    trainer.gradients(task, 0)
    gradients, adapters = gradients_of(built), everywhere(built.adapted)
    with torch.no_grad():
        built.adapted[0].adapter.B[0] += harness.CHANGE * 10
    control = harness.logits_of(trainer, task)
    found = None
    if gradients is not None:
        kind = type(task.model)
        again = replace(task, model=kind.from_pretrained(folder / "merged").eval())
        paths = module_paths(built, adapters)
        expected = by_peft(task, folder / "adapter")
        tensor, worst = harness.worst(errors(gradients, expected.gradients, paths))
        one = harness.oracle(again, folder / "gradients")
        found = {
            "logits": harness.logits_error(logits, expected, task),
            "merged": harness.logits_error(one.logits, expected, task),
            "control": harness.logits_error(control, expected, task),
            "gradient": worst,
            "tensor": tensor,
            "adapters": len(expected.gradients),
        }
    assert kept
    built.destroy()
    return harness.agreed(found)


def text(model: nn.Module) -> harness.Task:
    return harness.text_task(harness.randomise(model, seed=1), VOCABULARY)
