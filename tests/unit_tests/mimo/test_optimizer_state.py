# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint keeps of an optimizer, apart from sharded tensors. One process."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import Mock, call

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from megatron.core.models.mimo import optimizer
from megatron.core.models.mimo.optimizer import MimoOptimizer
from megatron.core.models.mimo.training import optimizer_state


def test_arguments_reach_every_modules_optimizer() -> None:
    inner = [Mock(), Mock()]
    both = SimpleNamespace(_active_optimizers=inner)
    for given in (False, True):
        MimoOptimizer.zero_grad(both, set_to_none=given)
    state = {"weights": 1}
    MimoOptimizer.reload_model_params(both, state_dict=state)
    MimoOptimizer.reload_model_params(both)
    for each in inner:
        assert each.zero_grad.mock_calls == [call(False), call(True)]
        assert each.reload_model_params.mock_calls == [call(state), call()]


def test_weights_of_either_kind_are_gathered_again_after_a_step(monkeypatch) -> None:
    finished = []
    monkeypatch.setattr(optimizer, "finish_param_gather", finished.append)
    dense, expert = (SimpleNamespace(param_gather_dispatched=True) for _ in range(2))
    module = SimpleNamespace(
        ddp_config=SimpleNamespace(overlap_param_gather=True),
        bucket_groups=[dense],
        expert_parallel_bucket_groups=[expert],
    )
    info = optimizer.ModuleOptimizerInfo(None, None, None, True, (module,))
    MimoOptimizer({"language": info}, None)._forget_gathers()
    assert finished == [dense, expert]
    assert [each.param_gather_dispatched for each in (dense, expert)] == [False, False]


def test_gradients_of_copies_that_are_tied_over_stages_are_looked_at() -> None:
    tied, own = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    tied.shared = True
    for each in (tied, own):
        each.grad = torch.ones(2)
    inner = SimpleNamespace(get_parameters=lambda: [own, tied])
    info = optimizer.ModuleOptimizerInfo(inner, None, None, True)
    (found,) = MimoOptimizer({"language": info}, None)._copies("language")
    assert found is tied.grad


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
