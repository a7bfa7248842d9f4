# SPDX-License-Identifier: Apache-2.0
"""What is checked before weights are read, where ranks differ. One process."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron.core.models.mimo.checkpoint.errors import CheckpointError
from megatron.core.models.mimo.checkpoint.load_checks import (
    check_no_main_copies,
    check_same_optimizer,
)
from megatron.core.models.mimo.checkpoint.manifest import Manifest
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from tests.unit_tests.mimo.in_process_ranks import InProcessWorld


@pytest.mark.parametrize(
    ("saved", "said"),
    [
        (
            {"distributed_optimizer": False, "optimizer": {"optimizer": "sgd"}},
            "was saved with optimizer='sgd', this run has optimizer='adam'; go on with .*='sgd'",
        ),
        (
            {"distributed_optimizer": True, "optimizer": {"optimizer": "adam"}},
            "was saved with the distributed optimizer, this run has the plain optimizer; go on wi",
        ),
    ],
)
def test_another_optimizer_than_the_one_that_saved_is_refused(
    saved: dict[str, Any], said: str
) -> None:
    config = OptimizerConfig(optimizer="adam", use_distributed_optimizer=False)
    with pytest.raises(CheckpointError, match=f"checkpoint run/step_1 {said}"):
        check_same_optimizer(Path("run/step_1"), Manifest(1, {}, 1, {}, {}, **saved), config)
    # Of older versions nothing is known.
    check_same_optimizer(Path("run/step_1"), Manifest(1, {}, 1, {}, {}), config)


@pytest.mark.parametrize("copied_on", [{0}, {1}, {0, 1}, set()], ids=str)
def test_fp32_copies_on_some_ranks_are_an_error_on_all(copied_on: set[int]) -> None:
    """Ranks that train nothing have none; one that went on to read would wait for the others."""

    def body(rank: int) -> str:
        weight = torch.nn.Parameter(torch.ones(2))
        if rank in copied_on:
            weight.main_param = weight.detach().clone()
        state = {"w": SimpleNamespace(data=weight), "none": SimpleNamespace()}
        if not copied_on:
            return str(check_no_main_copies(state))
        with pytest.raises(CheckpointError, match="an optimizer keeps fp32 copies") as caught:
            check_no_main_copies(state)
        return str(caught.value)

    assert len(set(InProcessWorld(2).run(body))) == 1
