# SPDX-License-Identifier: Apache-2.0
"""What is checked before weights are read, where ranks differ. One process."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron.core.models.mimo.checkpoint.errors import CheckpointError
from megatron.core.models.mimo.checkpoint.load_checks import check_no_main_copies
from tests.unit_tests.mimo.in_process_ranks import InProcessWorld


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
