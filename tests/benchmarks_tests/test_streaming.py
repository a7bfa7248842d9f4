# SPDX-License-Identifier: Apache-2.0
"""Host memory of an import and an export against their bound, on a small model.

Its largest tensor is small beside the model, so whatever keeps tensors goes far above the bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from benchmarks import streaming
from benchmarks.streaming import SLACK, Measured, Sizes, changed, measure, too_much
from megatron.core.models.mimo.huggingface.folder import ModelFolder
from megatron.core.models.mimo.huggingface.safetensors_file import SafetensorsFile
from mimo_colocated.launch import JobError
from tests.unit_tests.mimo.tiny_modules import on_all_ranks

# 134e6 parameters, 269 MB in two files; the largest tensor is 8 MB.
SMALL = Sizes(hidden=1024, mlp=4096, layers=8, heads=8, groups=4, vocabulary=4096)
KEEPS = {"import": (ModelFolder, "read"), "export": (SafetensorsFile, "write")}


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("streaming")
    several = dist.is_initialized() and dist.get_world_size() > 1
    where = on_all_ranks(where)[0] if several else where
    if not several or dist.get_rank() == 0:
        streaming.make(where / "model", SMALL)
    if several:
        dist.barrier()
    return where


def keep(patch: pytest.MonkeyPatch, owner: type, name: str) -> None:
    """A function keeps the tensors that it is given or returns, as many as there are."""
    plain: Callable[..., Any] = getattr(owner, name)
    kept = []

    def keeping(*given: Any) -> Any:
        found = plain(*given)
        kept.append((given[1:], found))
        return found

    patch.setattr(owner, name, keeping)


def test_one_rank_has_the_model_and_two_tensors(one_rank: None, folder: Path) -> None:
    (found,) = measure(folder, SMALL)
    assert found.reading >= found.shard > 16 * SMALL.largest
    assert not (folder / "exported").exists()


@pytest.mark.parametrize("what", list(KEEPS))
def test_tensors_that_are_kept_are_noticed(
    what: str, one_rank: None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(monkeypatch, *KEEPS[what])
    with pytest.raises(JobError, match=rf"^rank 0 took \d+ MB for the {what}, bound \d+ MB"):
        measure(folder, SMALL)


@pytest.mark.ranks(2)
def test_two_ranks_have_their_shards_and_two_tensors(folder: Path) -> None:
    for each in measure(folder, SMALL):
        assert 8 * SMALL.largest < each.shard < 17 * SMALL.largest


@pytest.mark.ranks(2)
def test_tensors_that_one_rank_keeps_are_noticed_on_both(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if dist.get_rank() == 1:
        keep(monkeypatch, *KEEPS["import"])
    with pytest.raises(JobError, match=r"^rank 1 took \d+ MB for the import, bound \d+ MB"):
        measure(folder, SMALL)


def test_a_byte_above_the_bound_is_too_much() -> None:
    def problems(reading: int, writing: int) -> list[str]:
        return too_much([Measured(0, 9, 0, 0, 0), Measured(reading, 100, writing, 0, 0)], 10)

    assert problems(120 + SLACK, 20 + SLACK) == []
    assert [text[:23] for text in problems(121 + SLACK, 20 + SLACK)] == ["rank 1 took 67 MB for t"]
    assert len(problems(121 + SLACK, 21 + SLACK)) == 2


def test_a_file_that_comes_back_otherwise_is_named(tmp_path: Path) -> None:
    for name, second in (("source", b"b"), ("target", b"c")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.safetensors").write_bytes(b"a")
        (tmp_path / name / "2.safetensors").write_bytes(second)
    (said,) = changed(tmp_path / "source", tmp_path / "target")
    assert said == "files of weights came back otherwise: ['2.safetensors'] of 2"
    assert not (tmp_path / "target").exists()
