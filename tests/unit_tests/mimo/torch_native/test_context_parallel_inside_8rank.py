# SPDX-License-Identifier: Apache-2.0
"""A torch-native language model over TP, CP and DP inside a ``MimoModel``; bf16."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core.models.mimo.torch_native import context_parallel, language_model
from megatron.core.models.mimo.torch_native.ring_attention import ring_attention
from mimo_colocated.launch.layouts import Layout
from tests.unit_tests.mimo.huggingface import harness
from tests.unit_tests.mimo.huggingface.llava_models import llava, llava_task
from tests.unit_tests.mimo.torch_native.kept_bytes import kept_by_norms

pytestmark = [pytest.mark.ranks(8), pytest.mark.once]

CUT, TP2 = Layout(tp=2, cp=2, dp=2), {"images": Layout(tp=2, dp=4)}
BOTH = {"torch_native": ("images", "language"), "sequence_parallel": True}
ROUTED = harness.Case(CUT, TP2, BOTH)
# Replicas show different numbers of images, which the gather bridge takes where DP sizes are equal.
GATHER = harness.Case(
    CUT, {"images": Layout(tp=4, dp=2)}, {"torch_native": ("language",), "bridge": "gather"}
)
HALVED = harness.Case(Layout(tp=2, dp=4), TP2, {**BOTH, "dtype": torch.bfloat16})


def test_over_the_gather_bridge(shared_tmp_path: Path) -> None:
    built, found = harness.compared(llava_task(llava("siglip-qwen2")), GATHER, shared_tmp_path)
    built.destroy()
    assert found.logits <= harness.LOGITS
    assert found.gradient <= harness.GRADIENTS, found.tensor


def test_over_the_routed_bridge_with_mistakes_and_what_norms_keep(
    shared_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TP and CP each keep their part of the residual stream."""
    task = llava_task(llava("clip-llama"))
    built, found = harness.compared(task, ROUTED, shared_tmp_path)
    assert found.logits <= harness.LOGITS
    assert found.gradient <= harness.GRADIENTS, found.tensor

    trainer = harness.trainer_of(built, task)
    wrapped = built.model.language_model
    sharded = kept_by_norms(wrapped, lambda: trainer.gradients(task, 0))
    whole = task.model.model.language_model
    ids = task.input_ids[: len(trainer.samples("language"))]
    unsharded = kept_by_norms(whole, lambda: whole(input_ids=ids))
    assert sharded * 4 == unsharded

    expected = _oracle(task, shared_tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(context_parallel, "ring_attention", _dropping)
        dropped = _gradient_error(built, trainer, task, expected)
    with monkeypatch.context() as patch:
        patch.setattr(language_model, "own_chunks", lambda whole, group: _flipped(whole, group))
        patch.setattr(context_parallel, "_check_chunks", lambda *_: None)
        misplaced = _gradient_error(built, trainer, task, expected)
    built.destroy()
    assert min(dropped, misplaced) > 0.01


def _dropping(query: Tensor, key: Tensor, value: Tensor, group: Any, scale: Any) -> Tensor:
    """What other ranks' queries ask of the keys of CP rank 1 is lost."""
    lost = key.detach() + 0 * key if group.rank() else key
    return ring_attention(query, lost, value, group, scale)


def _flipped(whole: Tensor, group: Any) -> Tensor:
    return context_parallel.own_chunks(whole.flip(1), group)


def _oracle(task: harness.Task, scratch: Path) -> harness.Oracle | None:
    """What transformers says, on rank 0."""
    return harness.oracle(task, scratch / "again") if dist.get_rank() == 0 else None


def _gradient_error(built: Any, trainer: Any, task: harness.Task, expected: Any) -> float:
    trainer.model.zero_grad_buffer()
    trainer.gradients(task, 0)
    gradients, error = harness.gradients_of(built), None
    if gradients is not None:
        _, error = harness.worst(harness.gradient_errors(gradients, expected.gradients))
    return harness.agreed(error)


def test_bf16(shared_tmp_path: Path) -> None:
    """The tower has bf16 weights and fp32 copies, the language model fp32 weights; both compute
    in bf16. Logits and gradients are as close to fp32 as transformers' own in bf16."""
    task = llava_task(llava("clip-llama"))
    built, found = harness.compared(task, HALVED, shared_tmp_path)
    gradients, errors = harness.gradients_of(built), None
    expected = _oracle(task, shared_tmp_path)
    if gradients is not None:
        errors = _distances(task, gradients, expected, shared_tmp_path)
    ours, theirs = harness.agreed(errors)
    trainer = harness.trainer_of(built, task)
    language = built.model.language_model.local_shards
    without_a_layer = _without(language, lambda: _logits_error(trainer, task, expected))
    trainer.step(task, 0)
    tower = built.model.modality_submodules["images"].local_shards
    stepped = [plain for plain in tower.parameters() if plain.requires_grad]
    kept = {plain.dtype for plain in language.parameters()}
    built.destroy()
    assert 0 < found.logits <= found.bound < without_a_layer
    assert 0 < ours <= harness.BF16_TIMES * theirs < 1
    assert kept == {torch.float32}
    assert {plain.dtype for plain in stepped} == {torch.bfloat16}
    assert {plain.main_param.dtype for plain in stepped} == {torch.float32}
    assert all(torch.equal(plain, plain.main_param.bfloat16()) for plain in stepped)
    # Steps below bf16's resolution are not lost.
    assert any(not torch.equal(plain.float(), plain.main_param) for plain in stepped)


def _distances(
    task: Any, found: Mapping[str, Tensor], oracle: Any, scratch: Path
) -> tuple[float, ...]:
    """The distance of all gradients from those in fp32: ours, transformers' in bf16."""
    expected = oracle.gradients
    halved = replace(task, model=copy.deepcopy(task.model).to(torch.bfloat16))
    theirs = harness.oracle(halved, scratch / "halved").gradients
    known = {name: truth for name, truth in expected.items() if name in found}
    whole = torch.cat([truth.flatten() for truth in known.values()])
    ours, rounded = (
        torch.cat([each[name].float().flatten() for name in known]) for each in (found, theirs)
    )
    return tuple(float((each - whole).norm() / whole.norm()) for each in (ours, rounded))


def _without(shards: Any, run: Any) -> Any:
    """What ``run`` returns while a layer's MLP adds nothing."""
    weight = shards.get_parameter("model.model.layers.0.mlp.down_proj.weight")
    before = weight.detach().clone()
    weight.data.zero_()
    found = run()
    weight.data.copy_(before)
    return found


def _logits_error(trainer: Any, task: Any, expected: Any) -> float:
    logits = harness.logits_of(trainer, task)
    return harness.agreed(expected and harness.logits_error(logits, expected, task))
