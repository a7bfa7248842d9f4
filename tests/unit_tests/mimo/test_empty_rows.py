# SPDX-License-Identifier: Apache-2.0
"""Rows that a rank without items brings: every parameter that trains gets a gradient of zeros."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megatron.core.models.mimo.model.encoder_runner import tied_to_parameters, trains

pytestmark = pytest.mark.once

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def encoder(weights: torch.dtype, norms: torch.dtype) -> nn.Module:
    """Layers of one dtype between norms of another one, as fp32 norms in a bf16 encoder."""
    parts = [nn.Linear(4, 4, dtype=weights), nn.LayerNorm(4, dtype=norms)]
    return nn.Sequential(*parts, nn.Linear(4, 3, dtype=weights))


@pytest.mark.parametrize("rows", DTYPES, ids=str)
@pytest.mark.parametrize("norms", DTYPES, ids=str)
@pytest.mark.parametrize("weights", DTYPES, ids=str)
def test_they_are_tied_to_parameters_of_every_dtype(
    weights: torch.dtype, norms: torch.dtype, rows: torch.dtype
) -> None:
    for frozen in ((), (0,), (1,), (0, 2)):
        module = encoder(weights, norms)
        for place in frozen:
            module[place].requires_grad_(False)
        check(module, rows)


def check(module: nn.Module, rows: torch.dtype) -> None:
    tied = tied_to_parameters(torch.empty(0, 3, dtype=rows), module)
    assert (tied.dtype, tuple(tied.shape)) == (rows, (0, 3))
    tied.sum().backward()
    for parameter in module.parameters():
        if parameter.requires_grad:
            assert parameter.grad.dtype == parameter.dtype
            assert torch.equal(parameter.grad, torch.zeros_like(parameter))
        else:
            assert parameter.grad is None


def test_of_a_frozen_encoder_they_are_tied_to_nothing() -> None:
    module = encoder(torch.bfloat16, torch.float32).requires_grad_(False)
    assert not trains(module)
    assert not tied_to_parameters(torch.empty(0, 3), module).requires_grad
