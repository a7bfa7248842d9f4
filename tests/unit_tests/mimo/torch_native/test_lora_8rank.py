# SPDX-License-Identifier: Apache-2.0
"""Adapters of peft in a torch-native language model: at TP 1 over FSDP, refused above."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from torch import nn

from megatron.core.models.mimo.huggingface.export import to_folder
from mimo_colocated.launch.layouts import Layout
from tests.parity.tensors import local_gradients, whole_tensors
from tests.unit_tests.mimo.huggingface import harness
from tests.unit_tests.mimo.torch_native.test_inside_8rank import BOTH, TP2, Inside

pytestmark = [pytest.mark.ranks(8), pytest.mark.once]


def adapt(model: nn.Module) -> None:
    """Put adapters in, the same on all ranks, which alone train."""
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)


def adapted(language: Layout) -> Inside:
    freeze = {"freeze": lambda model: adapt(model.language_model.model)}
    return Inside("clip-llama", BOTH, language, TP2, freeze)


def transformers_gradients(task: harness.Task) -> dict[str, torch.Tensor]:
    model: Any = task.model
    adapt(model.model.language_model)
    model.lm_head.requires_grad_(False)
    logits = model(input_ids=task.input_ids, **task.theirs()).logits
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), task.labels, reduction="none")
    ((losses * task.loss_mask).sum() / task.loss_mask.sum()).backward()
    named = model.model.language_model.named_parameters()
    return {name: p.grad for name, p in named if p.grad is not None}


def test_adapters_have_the_gradients_of_transformers(shared_tmp_path: Path) -> None:
    case = adapted(Layout(dp=8))
    task = case.task()
    if dist.get_rank() == 0:
        task.model.save_pretrained(shared_tmp_path / "model")
    dist.barrier()
    built = harness.built_case(shared_tmp_path / "model", case.case())
    harness.trainer_of(built, task).gradients(task, 0)
    found = whole_tensors(built.model, built.collections, local_gradients(built.model))
    with pytest.raises(ValueError, match=r"base_layer.weight that its family's table does not"):
        to_folder(built, shared_tmp_path / "out")
    built.destroy()
    expected = transformers_gradients(task)
    assert len(expected) == 8
    ours = {name: found[f"language_model.model.model.{name}"] for name in expected}
    assert len([name for name in found if name.startswith("language_model.")]) == 8
    _, error = harness.worst(harness.gradient_errors(ours, expected))
    assert error <= harness.GRADIENTS


def test_adapters_above_tp_1_are_refused(shared_tmp_path: Path) -> None:
    case = adapted(Layout(tp=2, dp=4))
    if dist.get_rank() == 0:
        case.task().model.save_pretrained(shared_tmp_path / "model")
    dist.barrier()
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj is a .*style 'column'"):
        harness.built_case(shared_tmp_path / "model", case.case())
