# SPDX-License-Identifier: Apache-2.0
"""Saves in the background: the bytes of a foreground save, whatever training does meanwhile.

A gate holds the writers back, so that "meanwhile" is no matter of luck.
"""

from __future__ import annotations

import errno
import io
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.models.mimo.checkpoint import background_save
from megatron.core.models.mimo.checkpoint.store import CheckpointError, CheckpointStore
from tests.unit_tests.mimo.digits_runs import FAN_IN, Run, run, same
from tests.unit_tests.mimo.tiny_modules import on_all_ranks

pytestmark = pytest.mark.ranks(8)


@pytest.fixture(scope="module")
def trained() -> Iterator[Run]:
    """A run after one step."""
    with run(FAN_IN, dropout=0.1) as one:
        one.train(0, 1)
        yield one


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Set, it lets rank 5's writer go on; the others are not held."""
    opened, write = threading.Event(), background_save.write_file

    def held(*args: Any) -> Any:
        if dist.get_rank() == 5:
            assert opened.wait(300)
        return write(*args)

    monkeypatch.setattr(background_save, "write_file", held)
    yield opened
    opened.set()


def names(root: Path) -> list[str]:
    """What is below ``root``, once all ranks are here."""
    dist.barrier()
    found = sorted(path.name for path in root.iterdir()) if root.exists() else []
    dist.barrier()
    return found


def files(store: CheckpointStore, step: int) -> dict[str, Any]:
    """Name -> size and digest of everything that holds state.

    ``.metadata`` says where that lies, and PyTorch may put a random name of the save into it.
    """
    found = dict(store.manifest(step).files)
    del found[".metadata"]
    return found


def test_the_bytes_and_the_losses_are_those_of_a_foreground_save(
    trained: Run, gate: threading.Event, shared_tmp_path: Path
) -> None:
    names_of_stores = ("before", "front", "back")
    before, front, back = (trained.store(shared_tmp_path / name) for name in names_of_stores)
    gate.set()
    # Both are of a run that was loaded: its parameter groups have what the saved ones had, too.
    trained.save(before, 1)
    trained.load(before, 1)
    trained.save(front, 1)
    losses = trained.train(1, 3)
    trained.load(front, 1)
    gate.clear()
    extra = {"data": [1]}
    model, optimizer = trained.built.model, trained.trainer.optimizer
    path = back.save(1, model, optimizer, extra, background=True)
    extra["data"].append(2)
    assert path == back.path(1)
    # Two steps long nothing of the checkpoint shows, and all weights change.
    assert trained.train(1, 2) == losses[:1]
    assert on_all_ranks(back.poll()) == 8 * [False]
    assert trained.train(2, 3) == losses[1:]
    assert on_all_ranks(back.steps()) == 8 * [[]]
    gate.set()
    back.wait()
    assert back.poll()
    assert on_all_ranks(back.steps()) == 8 * [[1]]
    assert back.manifest(1).extra == {"data": [1]}
    assert files(back, 1) == files(front, 1)
    assert names(back.root) == ["step_00000001"]
    weights = trained.weights()
    trained.load(back, 1)
    assert not same(trained.weights(), weights)
    assert trained.train(1, 3) == losses


def test_one_step_changes_the_bytes(trained: Run, shared_tmp_path: Path) -> None:
    """The test above sees it if a writer reads what training changes."""
    store = trained.store(shared_tmp_path)
    trained.save(store, 1)
    trained.train(1, 2)
    trained.save(store, 2)
    assert all(on_all_ranks(files(store, 1) != files(store, 2)))


@pytest.mark.parametrize("background", [True, False])
def test_only_a_background_save_copies_what_is_on_the_host(
    background: bool, tmp_path: Path
) -> None:
    """Stock copies some of it; what it hands out as it is must not be what training changes."""
    weight = torch.ones(3, device="cpu")
    request = SimpleNamespace(async_fn=len, async_fn_args=[0, [("p", "n", ([], [("w", weight)]))]])
    background_save.ShardWriter(request, tmp_path, digests=True, background=background)
    ((_, _, (_, ((_, written),))),) = request.async_fn_args[1]
    weight.zero_()
    assert torch.equal(written, torch.ones_like(weight)) == background


def test_the_next_save_and_a_load_wait(
    trained: Run, gate: threading.Event, shared_tmp_path: Path
) -> None:
    store = trained.store(shared_tmp_path)
    trained.save(store, 1, background=True)
    assert store.steps() == []
    gate.set()
    trained.save(store, 2, background=True)
    assert 1 in on_all_ranks(store.steps())[0]
    trained.load(store, 2)
    assert on_all_ranks(store.steps()) == 8 * [[1, 2]]
    assert store.poll()


class FullDisk(io.BytesIO):
    """A file that takes 1000 bytes: PyTorch's writer hides the disk's error behind its own."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self._number = number

    def write(self, content: bytes) -> int:
        if self.tell() + len(content) > 1000:
            raise OSError(self._number, os.strerror(self._number))
        return super().write(content)


def _poll(store: CheckpointStore, _one: Run) -> None:
    while not store.poll():
        pass


FOUND_BY = {
    "poll": _poll,
    "wait": lambda store, _one: store.wait(),
    "save": lambda store, one: one.save(store, 3),
    "load": lambda store, one: one.load(store, 1),
}


@pytest.mark.parametrize(
    ("found_by", "number"),
    [*((how, errno.ENOSPC) for how in FOUND_BY), ("poll", errno.EDQUOT), ("wait", errno.EIO)],
)
def test_a_writer_that_fails_is_an_error_of_the_run(
    found_by: str,
    number: int,
    trained: Run,
    shared_tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = trained.store(shared_tmp_path)
    trained.save(store, 1)

    if dist.get_rank() == 3:
        monkeypatch.setattr(filesystem_async, "open", lambda *_: FullDisk(number), raising=False)
    trained.save(store, 2, background=True)
    with pytest.raises(CheckpointError) as caught:
        FOUND_BY[found_by](store, trained)
    messages = on_all_ranks(str(caught.value))
    assert len(set(messages)) == 1
    advice = "; make room there and resume" if number in (errno.ENOSPC, errno.EDQUOT) else ""
    assert re.fullmatch(
        rf"rank 3 could not write checkpoint {store.path(2)}: .*{os.strerror(number)}\)?{advice}",
        messages[0],
    )
    assert names(shared_tmp_path) == ["step_00000001"]
    monkeypatch.undo()
    trained.save(store, 2, background=True)
    store.wait()
    assert on_all_ranks(store.steps()) == 8 * [[1, 2]]
