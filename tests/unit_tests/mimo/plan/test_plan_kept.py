# SPDX-License-Identifier: Apache-2.0
"""What a language model's layers keep, as planned and as counted in a forward pass. One process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from examples.mimo.digits.data import VOCABULARY_SIZE
from megatron.core.models.mimo.memory.kept import KeptStorages
from megatron.core.models.mimo.plan.candidates import Candidate
from megatron.core.models.mimo.plan.footprint import layer_bytes, rank_bytes
from megatron.core.models.mimo.plan.shapes import LanguageShape, Shapes, Stack, Work
from megatron.core.utils import unwrap_model
from mimo_colocated.launch.layouts import Layout
from tests.models.model import ModelOptions, ModelSize, build_model
from tests.unit_tests.mimo.plan.plan_cases import H100

_BATCH, _LENGTH, _WIDTH, _HEADS = 16, 32, 128, 8
_CPU = replace(H100, fused=False, communicator=0.0)


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def counted(layers: int, groups: int, dtype: torch.dtype, recompute: str) -> float:
    """Bytes per token that autograd keeps of a forward pass of the language model."""
    size = ModelSize(language_layers=layers, language_hidden=_WIDTH, language_query_groups=groups)
    options = ModelOptions(size=size, dtype=dtype, recompute=recompute)
    built = build_model(Layout(), Layout(), options)
    model = unwrap_model(built.model.language_model).train()
    device = next(model.parameters()).device
    hidden = torch.randn(_LENGTH, _BATCH, _WIDTH, dtype=dtype, device=device).requires_grad_()
    labels = torch.zeros(_BATCH, _LENGTH, dtype=torch.long, device=device)
    positions = torch.arange(_LENGTH, device=device).expand(_BATCH, -1)
    with KeptStorages([*model.parameters(), *model.buffers()]) as kept:
        model(None, positions, None, decoder_input=hidden, labels=labels)
    built.destroy()
    return kept.bytes / (_LENGTH * _BATCH)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("groups", [8, 2])
def test_a_layer_keeps_what_is_planned(
    groups: int, dtype: torch.dtype, recompute: str
) -> None:
    """To 1 %: rotary frequencies, which all layers share, are not counted."""
    one, three = (counted(layers, groups, dtype, recompute) for layers in (1, 3))
    stack = Stack(3, _WIDTH, 2 * _WIDTH, _HEADS, groups, _WIDTH // _HEADS, gated=True)
    whole = layer_bytes(stack, dtype.itemsize, 1, 1, fused=False)
    output = dtype.itemsize * _WIDTH + 4 * _HEADS
    planned = {"none": whole, "selective": whole - output, "full": dtype.itemsize * _WIDTH}
    assert planned[recompute] == pytest.approx((three - one) / 2, rel=0.01)
    # The control: with Transformer Engine's kernels it would be far less.
    assert layer_bytes(stack, dtype.itemsize, 1, 1, fused=True) < 0.7 * whole

    # The whole model is never planned below what it keeps; beside that a pass back needs room.
    shapes = Shapes(LanguageShape(stack, VOCABULARY_SIZE), {})
    work = Work(_LENGTH, _BATCH, {}, itemsize=dtype.itemsize)
    memory = rank_bytes(Candidate(Layout(), {}, 1, recompute=recompute), shapes, work, _CPU)
    tokens = _LENGTH * _BATCH
    assert memory.activations + memory.logits >= three * tokens
    kept = {"none": 3 * whole, "selective": 3 * (whole - output), "full": planned["full"] * 3}
    # Logits before the loss makes float32 of them are there for a moment, and so are gradients.
    ends = memory.logits / tokens - (dtype.itemsize + 4) * VOCABULARY_SIZE - 8 * _WIDTH
    ends -= 2 * _WIDTH if dtype.itemsize == 2 else 0
    assert kept[recompute] + ends == pytest.approx(three, rel=0.01)
