# SPDX-License-Identifier: Apache-2.0
"""Which recomputed layers give a weight its gradient in several parts. One process."""

from __future__ import annotations

import pytest
from torch import nn

from megatron.core.models.mimo.training.recompute import gradients_come_apart
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
