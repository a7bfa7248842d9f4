# SPDX-License-Identifier: Apache-2.0
"""Two nodes of four ranks, as far as a calibration knows: all ranks get one machine."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.core.models.mimo.job.calibration import Probe, calibrate
from tests.harness.backend import own_device

pytestmark = pytest.mark.ranks(8)


def test_links_inside_and_between_nodes() -> None:
    probe = Probe(own_device(), torch.float32, 16, 16, 8, 2, 4, seconds=0.01, ranks_of_node=4)
    found = calibrate(probe, "two nodes")
    told: list[Any] = [None] * 8
    dist.all_gather_object(told, asdict(found))
    assert all(each["node"] == 4 for each in told)
    # Rates are those of the slowest rank, so all say the same of what they did together.
    same = ("matmul", "attention", "encoder", "memory_rate", "layer_start", "hidden")
    for name in same:
        assert len({each[name] for each in told}) == 1, name
    assert found.inside_latency > 0
    assert found.between_latency > 0
    assert 0 <= found.hidden <= 1
    assert found.layer_start >= 0
    assert found.hop_latency >= 0
