# SPDX-License-Identifier: Apache-2.0
"""What is refused when an optimizer is built, and what is said of settings that differ. Pure."""

from __future__ import annotations

from typing import Any

import pytest

from megatron.core.models.mimo.training import optimizer_checks
from megatron.core.models.mimo.training.groups import make_grid
from megatron.core.models.mimo.training.optimizer_settings import differences_sentence
from megatron.core.optimizer.optimizer_config import OptimizerConfig

MUON = "optimizer 'muon' works with use_distributed_optimizer=False, .* and fp16=False; set them"


@pytest.mark.parametrize(
    ("there", "changes", "said"),
    [
        (False, {}, "optimizer 'muon' is not supported here; use 'adam', or 'sgd' with"),
        (True, {"use_distributed_optimizer": True}, MUON),
        (True, {"use_layer_wise_distributed_optimizer": True}, MUON),
        (True, {"fp16": True}, MUON),
        (True, {"bf16": True}, None),
        (True, {}, None),
    ],
)
def test_muon_where_its_package_is_and_where_it_is_not(
    there: bool, changes: dict[str, Any], said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizer_checks, "_has_muon", lambda: there)
    config = OptimizerConfig(optimizer="muon", use_distributed_optimizer=False)
    for name, value in changes.items():  # some are no field of every Megatron-Core
        setattr(config, name, value)
    if said is None:
        optimizer_checks.check_optimizer(config)
        return
    with pytest.raises(ValueError, match=said):
        optimizer_checks.check_optimizer(config)


@pytest.mark.parametrize(
    ("then", "settings", "said"),
    [
        (None, "run", "were not recorded when this state was saved; the saved ones count"),
        ({"lr": 1.0, "gone": 3}, "run", None),
        ({"lr": 2.0}, "run", r"lr 2\.0 -> 1\.0 \(this run's counts\)$"),
        ({"lr": 2.0}, "checkpoint", r"lr .* \(the saved one counts; settings='run' would take th"),
        ({"clip_grad": 2.0}, "checkpoint", r"clip_grad .* \(this run's counts\)$"),
        ({"initial_loss_scale": 8}, "run", r"scale 8 -> 4 \(the saved loss scale goes on\)$"),
    ],
)
def test_which_settings_count_is_said(
    then: dict[str, Any] | None, settings: str, said: str | None
) -> None:
    now = {"lr": 1.0, "clip_grad": 1.0, "initial_loss_scale": 4}
    sentence = differences_sentence(then, now, settings)
    if said is None:
        assert sentence is None
        return
    with pytest.raises(ValueError, match=said):
        raise ValueError(sentence)


@pytest.mark.parametrize("experts", [{"ep": 2}, {"expt_tp": 1}])
def test_grids_whose_dp_comes_last_have_no_experts(experts: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="dp_last=True is for grids without ep and expt_tp; leave"):
        make_grid(tp=1, dp=2, dp_last=True, **experts)
