# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint keeps of an optimizer, apart from sharded tensors. One process."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import Mock, call

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from megatron.core.models.mimo import optimizer
from megatron.core.models.mimo.checkpoint import frozen_state
from megatron.core.models.mimo.optimizer import MimoOptimizer
from megatron.core.models.mimo.training import optimizer_settings, optimizer_state
from megatron.core.models.mimo.training.inner_optimizers import held_scales


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


def test_every_module_is_in_the_state_on_every_rank(monkeypatch) -> None:
    """Those of other ranks and frozen ones with nothing: callers look them up."""
    monkeypatch.setattr(optimizer, "sharded_inner_state", lambda inner, *_, **__: {"of": inner})
    monkeypatch.setattr(optimizer, "inner_state", lambda inner: {"of": inner})
    monkeypatch.setattr(MimoOptimizer, "_replica_id", lambda self, name: (0, 0, 0))
    inner = SimpleNamespace()
    kinds = {"elsewhere": (inner, False), "frozen": (None, True), "here": (inner, True)}
    made = {
        name: optimizer.ModuleOptimizerInfo(which, None, None, active)
        for name, (which, active) in kinds.items()
    }
    both = MimoOptimizer(made, None)
    here = {"here": {"of": inner}}
    assert both.sharded_state_dict({}) == {"elsewhere": {}, "frozen": {}, **here}
    assert both.state_dict() == {"elsewhere": None, "frozen": None, **here}


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


def merged(mine: list[dict], saved: list[dict]) -> tuple[list[dict], int]:
    """Groups of a run that was built as the one that saved, which has moved since."""
    inner = SimpleNamespace(optimizer=SimpleNamespace(param_groups=mine))
    built = [{**mine[0], "wd_mult": each["wd_mult"]} for each in saved]
    return optimizer_settings.merged_groups(inner, saved, {"built": built}, "run")


def test_a_group_that_was_not_saved_counts_on_from_the_steps_of_the_others() -> None:
    """Fused optimizers count in their groups, all of a module alike."""
    mine = [{"params": [], "wd_mult": mult, "lr": 0.5} for mult in (1.0, 0.0)]
    groups, common = merged(mine, [{"params": [], "wd_mult": 1.0, "lr": 0.25, "step": 7}])
    assert common == 1
    assert [(group["lr"], group["step"]) for group in groups] == [(0.25, 7), (0.5, 7)]


def test_groups_that_nothing_else_tells_apart_go_by_their_order() -> None:
    mine = [{"params": [], "wd_mult": 1.0, "lr": 0.5} for _ in range(3)]
    groups, common = merged(mine, [{**mine[0], "lr": lr} for lr in (0.25, 0.125)])
    assert common == 2
    assert [group["lr"] for group in groups] == [0.25, 0.125, 0.5]


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


def test_what_starts_anew_has_no_moments_and_no_count() -> None:
    """In mid-run, too, when the optimizer has stepped before the checkpoint is loaded."""
    weight = torch.nn.Parameter(torch.ones(2))
    stepping = torch.optim.Adam([weight], lr=0.1)
    weight.grad = torch.ones(2)
    stepping.step()
    stepping.param_groups[0]["step"] = 1  # where fused Adams count
    reloaded: list[bool] = []
    inner = SimpleNamespace(
        optimizer=stepping, reload_model_params=lambda: reloaded.append(True)
    )
    optimizer_state.start_anew(inner)
    assert not stepping.state
    assert "step" not in stepping.param_groups[0]
    assert reloaded == [True]


def test_a_loss_scale_moves_again_after_a_step_that_raised() -> None:
    class Scaler:
        def __init__(self) -> None:
            self.told: list[bool] = []

        def update(self, found_inf: bool) -> None:
            self.told.append(found_inf)

    scaler = Scaler()

    def step() -> None:
        with held_scales([scaler]):
            scaler.update(True)
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        step()
    scaler.update(False)
    assert scaler.told == [False]


def test_an_optimizer_that_keeps_no_tensors_is_loaded_like_others() -> None:
    """Plain SGD has groups alone; that something was frozen when they were saved is no matter."""
    group = {"lr": 0.1}
    asked = frozen_state.start_fresh({"language": {"groups": [group]}}, {}, frozenset({"weight"}))
    assert asked == {"language": {"groups": {0: group}}}
