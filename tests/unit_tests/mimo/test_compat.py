# SPDX-License-Identifier: Apache-2.0
"""What stock Megatron-Core is handed: metadata, the group that reads, files to sync."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron.core.models.mimo.compat import (
    fully_parallel_load,
    metadata_with_dp_cp_group,
    packed_seq_params,
    write_file,
)
from megatron.core.models.mimo.partition.packed_lengths import CU_SEQLENS


@pytest.mark.parametrize("groups", [None, SimpleNamespace(dp_cp=object())])
def test_metadata_stays_the_callers(groups):
    """Megatron fills the dict that it is given, and the next module has other groups."""
    given = {"singleton_local_shards": True}
    metadata_with_dp_cp_group(given, groups, "owner")["more"] = 1
    assert given == {"singleton_local_shards": True}


def test_lengths_of_every_kind_become_32_bit_and_nothing_else_does():
    """Transformer Engine's kernels would misread others."""
    made = packed_seq_params({**dict.fromkeys(CU_SEQLENS, torch.tensor([0, 4])), "max_seqlen_q": 4})
    assert {getattr(made, name).dtype for name in CU_SEQLENS} == {torch.int32}
    assert (made.max_seqlen_q, made.qkv_format) == (4, "thd")


def test_reading_is_shared_over_the_group_that_is_given():
    group = object()
    assert fully_parallel_load(group).parallelization_group is group


def test_a_file_is_on_the_disk_when_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, file = [], tmp_path / "__0_0.distcp"
    monkeypatch.setattr(
        os, "fsync", lambda number: synced.append(os.readlink(f"/proc/self/fd/{number}"))
    )
    request = SimpleNamespace(async_fn=SimpleNamespace(args=([],)))
    write_file(request, 0, (str(file), file.name, ([], [])))
    assert synced == [str(file)]
