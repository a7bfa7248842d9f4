# SPDX-License-Identifier: Apache-2.0
"""The thread that writes a rank's files: whatever goes wrong in it is an error of the run."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron.core.models.mimo.checkpoint import background_save
from megatron.core.models.mimo.checkpoint.background_save import ShardWriter

pytestmark = pytest.mark.once

ERRORS = [OSError("full"), RuntimeError("no memory"), pickle.PicklingError("no"), KeyError("w")]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("background", [False, True], ids=["here", "in_a_thread"])
@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_every_error_of_a_writer_is_raised_by_join(
    error: Exception, background: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second of three files: the first is described, the third is not begun."""
    begun: list[int] = []

    def write(_request: Any, number: int, bucket: Any) -> str:
        begun.append(number)
        if number == 1:
            raise error
        (tmp_path / bucket[1]).write_bytes(b"x")
        return "written"

    buckets = [(str(tmp_path / name), name, None) for name in ("a", "b", "c")]
    monkeypatch.setattr(background_save, "write_file", write)
    monkeypatch.setattr(background_save, "host_copies", lambda _request, copy: buckets)
    writer = ShardWriter(SimpleNamespace(), tmp_path, digests=True, background=background)
    if background:
        writer.start()
    with pytest.raises(type(error)) as caught:
        writer.join()
    assert caught.value is error
    assert begun == [0, 1]
    assert list(writer.files) == ["a"]
    assert writer.failed() == background
