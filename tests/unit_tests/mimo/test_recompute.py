# SPDX-License-Identifier: Apache-2.0
"""Recomputed layers: what they are given, and which give gradients in parts. One process."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megatron.core.models.mimo.memory.layer_recompute import gradients_come_apart, recomputable
from tests.unit_tests.mimo.model_stubs import language_config

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
ATTENTION = {"recompute_granularity": "selective"}
MLP = {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]}


@pytest.mark.parametrize(
    ("settings", "apart"), [({}, False), (ATTENTION, False), (MLP, True), (FULL, True)]
)
def test_recomputed_parts_with_weights(settings: dict, apart: bool):
    inner = nn.Linear(2, 2)
    inner.config = language_config(**settings)
    assert gradients_come_apart(nn.Sequential(nn.Linear(2, 2), inner)) is apart


@pytest.mark.parametrize("frozen", [(), ("0",), ("0", "1")], ids=["none", "some", "all"])
def test_what_trains_in_part_is_given_an_input_with_a_gradient(frozen: tuple[str, ...]):
    layers = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    layers.config = language_config(**FULL)
    for name in frozen:
        layers.get_submodule(name).requires_grad_(False)
    assert recomputable(torch.ones(2), layers).requires_grad is (len(frozen) < 2)
