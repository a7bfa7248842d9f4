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
    read_manifest,
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


@pytest.mark.parametrize("unreadable_on", [{0}, {2}, {1, 2}, {0, 1, 2}, set()], ids=str)
@pytest.mark.parametrize("other_on", [set(), {1}, {2}], ids=str)
def test_a_manifest_that_some_ranks_cannot_read_is_an_error_on_all(
    unreadable_on: set[int], other_on: set[int]
) -> None:
    """Of the first rank that has one; what it says itself, not that ranks differ."""

    def body(rank: int) -> Any:
        def manifest(step: int) -> Any:
            if rank in unreadable_on:
                raise CheckpointError(f"rank {rank} cannot read step {step}")
            return SimpleNamespace(to_json=lambda: f"{rank in other_on}", rank=rank)

        history: Any = SimpleNamespace(manifest=manifest, path=lambda step: Path(f"step_{step}"))
        try:
            return read_manifest(history, 7).rank
        except CheckpointError as error:
            return str(error)

    found = InProcessWorld(3).run(body)
    first = min(unreadable_on | other_on, default=None)
    if first is None:
        assert found == [0, 1, 2]
    elif first in unreadable_on:
        assert found == [f"rank {first} cannot read step 7"] * 3
    else:
        assert len(set(found)) == 1
        assert f"rank {first} sees another checkpoint in step_7 than rank 0; give" in found[0]
