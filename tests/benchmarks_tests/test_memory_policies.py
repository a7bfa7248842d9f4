# SPDX-License-Identifier: Apache-2.0
"""How bytes that are allocated are counted. One process."""

from __future__ import annotations

import torch

from benchmarks.memory_policies import DEFAULT, POLICIES, allocated
from megatron.core.models.mimo.memory.offload import HostUse, OffloadedPart
from megatron.core.models.mimo.memory.policy import EncoderMemory

MIB = 2**20


def test_tensors_count_from_allocation_to_release_and_host_copies_do_not():
    host = HostUse()
    before = allocated(host)
    tensor = torch.empty(4 * MIB, dtype=torch.uint8)
    assert abs(allocated(host) - before - 4 * MIB) < MIB // 4
    part = OffloadedPart([], 0, host)
    packed = part._pack(tensor)
    del tensor
    assert host.now == 4 * MIB
    assert abs(allocated(host) - before) < MIB // 4
    back = part._unpack(packed)
    assert abs(allocated(host) - before - 4 * MIB) < MIB // 4
    del back, packed
    assert abs(allocated(host) - before) < MIB // 4


def test_every_case_predicts_a_saving_for_every_policy():
    for case in DEFAULT:
        savings = [case.predicted(EncoderMemory(*policy)).saving for policy in POLICIES]
        assert savings[0] == 0
        assert min(savings[1:]) > 0
        assert max(savings) == savings[-1]
