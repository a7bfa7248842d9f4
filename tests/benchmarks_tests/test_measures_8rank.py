# SPDX-License-Identifier: Apache-2.0
"""The measurements on 8 ranks: bytes and memory against their bounds, no timing."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from benchmarks import bytes_moved, memory
from benchmarks.cases import FAN_IN_4_4, FAN_OUT_2_2
from benchmarks.counting import counted

pytestmark = pytest.mark.ranks(8, timeout=90)


@pytest.mark.parametrize("pair", [FAN_IN_4_4, FAN_OUT_2_2], ids=["fan_in", "fan_out"])
def test_bytes_are_those_of_the_formula_and_of_the_lower_bound(pair):
    uniform, uneven = bytes_moved.measure((pair,), quick=True)
    assert (uniform["tokens"], uniform["passed"]) == ("uniform", True)
    assert [uniform["gather"], uniform["routed"]] == uniform["expected"]
    assert (uneven["tokens"], uneven["passed"]) == ("uneven", True)
    assert uneven["routed"][1] > 0
    if pair is FAN_IN_4_4:
        assert uniform["fewer"] == [4, 8]


def test_peak_memory_of_the_path_is_that_of_a_cp_part():
    (cell,) = memory.measure((FAN_IN_4_4,), quick=True)
    assert cell["passed"], cell


def test_a_collective_without_a_rule_is_not_overlooked(rank_device):
    with counted() as traffic, pytest.raises(AssertionError, match="broadcast has no rule"):
        dist.broadcast(torch.zeros(1, device=rank_device), src=0)
    assert (traffic.received, traffic.calls) == (0, 0)
