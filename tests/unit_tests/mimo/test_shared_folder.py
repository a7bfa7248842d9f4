# SPDX-License-Identifier: Apache-2.0
"""Ranks that do not see one folder are told so, all of them, before anything is lost.

All ranks are threads of one process (``in_process_ranks.py``) and look at folders of their own
where a case says so. Nothing may be left behind in any of them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron.core.models.mimo.checkpoint import shared_folder
from megatron.core.models.mimo.checkpoint.history import CheckpointError, History
from megatron.core.models.mimo.checkpoint.shared_folder import check_shared
from tests.unit_tests.mimo.in_process_ranks import InProcessWorld

pytestmark = pytest.mark.once

WORLD = 8


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_folder, "PATIENCE_S", 0.05)


def said(root_of: Callable[[int], Path], before: Callable[[int], None] = lambda rank: None) -> str:
    """What all ranks raise; empty if none does."""

    def body(rank: int) -> str:
        before(rank)
        try:
            check_shared(root_of(rank))
        except CheckpointError as error:
            return str(error)
        return ""

    messages = set(InProcessWorld(WORLD).run(body))
    assert len(messages) == 1
    return messages.pop()


def everything(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


@pytest.mark.parametrize("there", [True, False], ids=["there", "not-yet"])
def test_one_folder_passes_and_nothing_is_left(there: bool, tmp_path: Path) -> None:
    root = tmp_path / "run" / "checkpoints"
    if there:
        (root / "step_00000001").mkdir(parents=True)
    before = everything(tmp_path)
    assert said(lambda rank: root) == ""
    assert everything(tmp_path) == before


@pytest.mark.parametrize("there", [True, False], ids=["there", "not-yet"])
def test_nodes_with_folders_of_their_own_are_named(there: bool, tmp_path: Path) -> None:
    roots = [tmp_path / str(node) / "checkpoints" for node in (0, 1)]
    for root in roots if there else []:
        root.mkdir(parents=True)
    before = everything(tmp_path)
    message = said(lambda rank: roots[rank // 4])
    assert re.fullmatch(
        rf"ranks 4-7 cannot see the folder {roots[0]} of rank 0 \(rank 4 looked at {roots[1]} on "
        r"\S+\); all ranks write a checkpoint into one folder: give one on a file system that all "
        "nodes share and may write",
        message,
    )
    assert everything(tmp_path) == before


def test_one_rank_that_cannot_write_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch = Path.touch

    def refuse(path: Path, exist_ok: bool = True) -> None:
        if path.name.endswith("_5"):
            raise PermissionError(13, "Permission denied")
        touch(path, exist_ok=exist_ok)

    monkeypatch.setattr(Path, "touch", refuse)
    message = said(lambda rank: tmp_path)
    assert re.match(r"rank 5 cannot write \(Permission denied\) into the folder", message)
    assert everything(tmp_path) == []


def test_a_rank_whose_files_others_do_not_see_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layered file system: what is below it is seen, what is written stays on top of it."""
    monkeypatch.setattr(
        Path, "touch", lambda path, exist_ok: path.name.endswith("_5") or path.open("x").close()
    )
    message = said(lambda rank: tmp_path)
    assert re.match(r"rank 5 cannot write where others see it into the folder", message)
    assert everything(tmp_path) == []


def test_a_file_that_shows_late_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_folder, "PATIENCE_S", 5.0)
    listed, stale = os.listdir, [3]

    def cached(folder: Path) -> list[str]:
        stale[0] -= 1
        return [] if stale[0] >= 0 else listed(folder)

    monkeypatch.setattr(shared_folder.os, "listdir", cached)
    assert said(lambda rank: tmp_path) == ""
    assert stale[0] < 0


def read_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "touch", refuse)
    monkeypatch.setattr(Path, "mkdir", refuse)


@pytest.mark.parametrize("steps", [(), (100, 200)])
def test_a_folder_to_read_from_only_passes(
    steps: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in steps:
        (tmp_path / f"step_{step:08d}").mkdir()
    read_only(monkeypatch)
    assert said(lambda rank: tmp_path) == ""


@pytest.mark.parametrize(
    ("here", "there"), [((100,), (200,)), ((100,), ()), ((), (100,))], ids=["other", "less", "more"]
)
def test_folders_to_read_from_must_hold_the_same(
    here: tuple[int, ...],
    there: tuple[int, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for node, steps in enumerate((here, there)):
        for step in steps:
            (tmp_path / str(node) / f"step_{step:08d}").mkdir(parents=True)
    read_only(monkeypatch)
    message = said(lambda rank: tmp_path / str(rank // 7))
    assert re.match(r"rank 7 cannot see the checkpoints of the folder \S+/0 of rank 0 \(", message)


def test_a_folder_that_cannot_be_listed_has_no_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rank may not look into the folder; the sentence is still that of all."""
    (tmp_path / "step_00000100").mkdir()
    read_only(monkeypatch)
    steps = History.steps

    def listed(line: History) -> list[int]:
        if dist.get_rank() == 3:
            raise PermissionError(13, "Permission denied")
        return steps(line)

    monkeypatch.setattr(History, "steps", listed)
    message = said(lambda rank: tmp_path)
    assert re.match(r"rank 3 cannot see the checkpoints of the folder \S+ of rank 0 \(", message)


def test_a_place_where_no_folder_can_be_is_left_to_the_save(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert said(lambda rank: tmp_path / "file" / "run") == ""
