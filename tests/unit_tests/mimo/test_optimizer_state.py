# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint keeps of an optimizer, apart from sharded tensors. One process."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import Mock, call

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from megatron.core.models.mimo.optimizer import MimoOptimizer
from megatron.core.models.mimo.training import optimizer_state


def test_arguments_reach_every_modules_optimizer() -> None:
    inner = [Mock(), Mock()]
    optimizer = SimpleNamespace(_active_optimizers=inner)
    for given in (False, True):
        MimoOptimizer.zero_grad(optimizer, set_to_none=given)
    state = {"weights": 1}
    MimoOptimizer.reload_model_params(optimizer, state_dict=state)
    MimoOptimizer.reload_model_params(optimizer)
    for each in inner:
        assert each.zero_grad.mock_calls == [call(False), call(True)]
        assert each.reload_model_params.mock_calls == [call(state), call()]


def test_a_loss_scale_is_saved_from_the_host() -> None:
    """Else every rank would load it to the device of the rank that wrote it."""
    with FakeTensorMode() as fake:
        scale = FakeTensor(fake, torch.ones(1, device="meta"), torch.device("xpu"))
        state = {"grad_scaler": {"scale": scale, "growth_tracker": 3}, "groups": [scale]}
        kept = optimizer_state._without_local(state)
    assert scale.device.type == "xpu"
    assert kept["grad_scaler"]["scale"].device.type == "cpu"
    assert kept["grad_scaler"]["growth_tracker"] == 3
    assert kept["groups"][0].device.type == "cpu"
