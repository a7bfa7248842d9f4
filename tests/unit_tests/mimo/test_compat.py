# SPDX-License-Identifier: Apache-2.0
"""What stock Megatron-Core is handed: metadata, the group that reads, files to sync."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron.core.models.mimo.compat import (
    fully_parallel_load,
    metadata_with_dp_cp_group,
    write_file,
)


@pytest.mark.parametrize("groups", [None, SimpleNamespace(dp_cp=object())])
def test_metadata_stays_the_callers(groups):
    """Megatron fills the dict that it is given, and the next module has other groups."""
    given = {"singleton_local_shards": True}
    metadata_with_dp_cp_group(given, groups, "owner")["more"] = 1
    assert given == {"singleton_local_shards": True}


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
