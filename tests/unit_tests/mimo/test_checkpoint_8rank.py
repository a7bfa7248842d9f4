# SPDX-License-Identifier: Apache-2.0
"""Saving and loading checkpoints on 8 ranks: exact, layout-free, and whole or absent.

``test_checkpoint_refused_8rank.py`` has what cannot be loaded. Failures are injected into what
rank 0 does alone (make room, publish) and into one rank's writer.
"""

from __future__ import annotations

import errno
import random
import re
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.models.mimo.checkpoint import background_save, history, shared_folder
from megatron.core.models.mimo.checkpoint.store import (
    FORMAT,
    CheckpointError,
    CheckpointStore,
)
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from tests.harness.backend import own_device
from tests.unit_tests.mimo.digits_runs import (
    ENCODER_CP,
    FAN_IN,
    FAN_OUT,
    SIZE,
    Run,
    only_rank_0,
    run,
    same,
)
from tests.unit_tests.mimo.tiny_modules import on_all_ranks

pytestmark = pytest.mark.ranks(8)

# So that losses depend on every module's random states.
DROPOUT = 0.1
SHARDING = pytest.mark.parametrize("distributed", [False, True], ids=["whole", "sharded"])


def draws() -> list:
    """The next numbers of every generator of the process."""
    with get_cuda_rng_tracker().fork():
        forked = torch.rand(2, device=own_device()).tolist()
    return [random.random(), float(np.random.rand()), torch.rand(2, device="cpu").tolist(), forked]


def files(root: Path) -> list[str]:
    """Everything below ``root``, once all ranks are here."""
    dist.barrier()
    found = sorted(str(p.relative_to(root)) for p in root.rglob("*")) if root.exists() else []
    dist.barrier()
    return found


# ---- what comes back --------------------------------------------------------------------------


@SHARDING
def test_the_same_layout_continues_bit_for_bit(distributed: bool, shared_tmp_path: Path) -> None:
    with run(FAN_IN, distributed, dropout=DROPOUT) as first:
        first.train(0, 2)
        first.save(first.store(shared_tmp_path), 2)
        saved = first.weights(), first.optimizer_state(), first.built.randomness.get_states()
        numbers = draws()
        losses, last = first.train(2, 4), first.weights()
    with run(FAN_IN, distributed, seed=6, dropout=DROPOUT) as second:
        assert not same(second.weights(), saved[0])
        torch.manual_seed(8)
        random.seed(8)
        np.random.seed(8)
        second.load(second.store(shared_tmp_path), 2)
        assert same(second.weights(), saved[0])
        found = second.optimizer_state()
        assert len(found) == len(saved[1]) > 0
        assert all(torch.equal(a, b) for a, b in zip(found, saved[1], strict=True))
        for name, state in second.built.randomness.get_states().items():
            assert torch.equal(state["default"], saved[2][name]["default"])
            assert same(state["tracker"], saved[2][name]["tracker"])
        assert draws() == numbers
        # Two: a step count shared between parameters after loading shows in the second.
        assert second.train(2, 4) == losses
        assert same(second.weights(), last)


@SHARDING
@pytest.mark.parametrize(
    "pairs",
    [(FAN_IN, FAN_OUT), (FAN_OUT, FAN_IN), (ENCODER_CP, FAN_OUT)],
    ids=["in_out", "out_in", "encoder_cp_out"],
)
def test_another_layout_loads_the_same_weights_and_continues(
    distributed: bool, pairs: tuple[tuple[str, str], tuple[str, str]], shared_tmp_path: Path
) -> None:
    here, there = shared_tmp_path / "here", shared_tmp_path / "there"
    with run(pairs[0], distributed) as first:
        first.train(0, 2)
        first.save(first.store(here), 2)
        weights, state = first.weights(), first.optimizer_state()
        losses = first.train(2, 4)
        with run(pairs[1], distributed, seed=6) as second:
            second.load(second.store(here), 2)
            numbers = draws()
            # No rank's random state has a counterpart here: it is one of the step instead.
            second.built.randomness.reseed(2)
            assert draws() == numbers
            second.save(second.store(there), 2)
            # fp32 sums in another order.
            assert second.train(2, 4) == pytest.approx(losses, rel=1e-6)
        # Back again: what went through the other layout's shards is what left.
        first.load(first.store(there), 2)
        assert same(first.weights(), weights)
        assert all(torch.equal(a, b) for a, b in zip(first.optimizer_state(), state, strict=True))


def test_the_manifest_says_what_was_saved(trained: Run, shared_tmp_path: Path) -> None:
    store = trained.store(shared_tmp_path)
    # Before the first step: 0 is a step like others.
    path = store.save(0, trained.built.model, trained.trainer.optimizer, {"data": [1, "a"]})
    manifest = store.manifest(0)
    assert store.steps() == [0]
    assert path == store.path(0)
    assert path.name == "step_00000000"
    assert (manifest.step, manifest.world_size, manifest.format) == (0, 8, FORMAT)
    assert manifest.layouts == trained.built.layouts()
    assert manifest.extra == {"data": [1, "a"]}
    embedding = [k for k in manifest.shapes if "word_embeddings" in k]
    assert manifest.shapes[embedding[0]][1] == SIZE.language_hidden
    assert store.same_layout(manifest)
    assert not store.same_layout(replace(manifest, world_size=4))
    assert not CheckpointStore(shared_tmp_path, {}).same_layout(manifest)


def test_ranks_that_do_not_see_one_folder_are_told_so(
    trained: Run, shared_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_folder, "PATIENCE_S", 0.2)
    roots = [shared_tmp_path / name for name in ("one", "other")]
    with pytest.raises(CheckpointError) as caught:
        trained.store(roots[dist.get_rank() // 4])
    assert len(set(on_all_ranks(str(caught.value)))) == 1
    assert re.search(rf"ranks 4-7 cannot see the folder {roots[0]} of rank 0", str(caught.value))
    assert files(shared_tmp_path) == []


# ---- whole or absent --------------------------------------------------------------------------


def refused(trained: Run, root: Path) -> str:
    """The error of a save, the same on all ranks; nothing is left behind."""
    with pytest.raises(CheckpointError) as caught:
        trained.save(trained.store(root), 1)
    messages = on_all_ranks(str(caught.value))
    assert len(set(messages)) == 1
    assert trained.store(root).steps() == []
    assert files(root) == []
    return messages[0]


def test_a_full_disk_is_seen_before_anything_is_written(
    trained: Run, shared_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(10**9, 10**9 - 1000, 1000))
    message = refused(trained, shared_tmp_path / "run")
    assert re.search(r"rank 0 could not write .* MB needed, 0\.0 MB free: make room", message)


@pytest.mark.parametrize("rank", [0, 3])
def test_a_write_that_fails_on_one_rank_fails_on_all(
    rank: int, trained: Run, shared_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: object, **_kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if dist.get_rank() == rank:
        monkeypatch.setattr(filesystem_async, "_write_item", full)
    message = refused(trained, shared_tmp_path / "run")
    assert re.search(rf"rank {rank} could not write checkpoint .*No space left", message)
    monkeypatch.undo()
    store = trained.store(shared_tmp_path / "run")
    trained.save(store, 1)
    assert store.steps() == [1]


@pytest.mark.parametrize("broken", ["rename", "fsync", "manifest"])
def test_a_checkpoint_that_cannot_be_published_is_absent(
    broken: str, trained: Run, shared_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    # Only what publishes: the writers of the tensors use os themselves.
    if broken == "fsync":
        monkeypatch.setattr(history, "fsync", fail)
    elif broken == "rename":
        monkeypatch.setattr(history, "os", SimpleNamespace(rename=fail))
        monkeypatch.setattr(history, "fsync", lambda _path: None)
    else:
        monkeypatch.setattr(Path, "write_text", fail)
    message = refused(trained, shared_tmp_path / "run")
    assert re.search(r"rank 0 could not complete checkpoint .*Input/output error", message)


def test_a_checkpoint_is_not_there_before_it_is_whole(
    trained: Run, shared_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a run finds that starts after this one was killed while it wrote."""
    store = trained.store(shared_tmp_path)
    seen: list[list[int]] = []
    flushed: set[str] = set()
    write, publish = background_save.write_file, history.fsync

    def watched_write(*args: object) -> object:
        seen.append(store.steps())
        return write(*args)

    def watched_publish(path: Path) -> None:
        publish(path)
        if path != shared_tmp_path:
            seen.append(store.steps())
            flushed.add(path.name)

    monkeypatch.setattr(background_save, "write_file", watched_write)
    monkeypatch.setattr(history, "fsync", watched_publish)
    trained.save(store, 1)
    assert seen
    assert not any(seen)
    assert store.steps() == [1]
    assert dist.get_rank() > 0 or {p.name for p in store.path(1).iterdir()} <= flushed


def test_a_folder_that_cannot_be_made_is_named(trained: Run, shared_tmp_path: Path) -> None:
    (shared_tmp_path / "file").touch()
    dist.barrier()
    with pytest.raises(CheckpointError, match=r"rank 0 could not write checkpoint .*file/run"):
        trained.save(trained.store(shared_tmp_path / "file" / "run"), 1)


def test_leftovers_of_a_killed_save_are_ignored_and_then_removed(
    trained: Run, shared_tmp_path: Path
) -> None:
    def leave() -> None:
        for name in (".saving_00000009", ".saving_over_00000002", "step_1", "other"):
            (shared_tmp_path / name).mkdir()
            (shared_tmp_path / name / "__0_0.distcp").write_bytes(b"half")
        (shared_tmp_path / "step_00000004").touch()

    only_rank_0(leave)
    store = trained.store(shared_tmp_path)
    assert store.steps() == []
    dist.barrier()
    trained.save(store, 1)
    assert store.steps() == [1]
    names = sorted(p.name for p in shared_tmp_path.iterdir())
    assert names == ["other", "step_00000001", "step_00000004", "step_1"]


def test_only_the_newest_are_kept(trained: Run, shared_tmp_path: Path) -> None:
    store, seen = trained.store(shared_tmp_path, keep=2), []
    for step in (1, 2, 3):
        trained.save(store, step)
        seen.append(on_all_ranks(store.steps())[5])
    assert seen == [[1], [1, 2], [2, 3]]
    assert sorted(p.name for p in shared_tmp_path.iterdir()) == ["step_00000002", "step_00000003"]


@pytest.mark.parametrize("keep", [0, -1])
def test_keeping_none_is_refused(keep: int, shared_tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"keep={keep}.*at least 1"):
        CheckpointStore(shared_tmp_path, {}, keep=keep)


def test_going_back_saves_the_new_run_and_keeps_the_abandoned_one(
    trained: Run, shared_tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    root = shared_tmp_path
    store = trained.store(root)
    for step in (1, 2, 3):
        if step > 1:
            trained.train(step - 1, step)
        trained.save(store, step)
    old = {p.name: p.read_bytes() for p in store.path(3).iterdir()}
    trained.load(store, 2)  # the oldest is rotated out
    trained.train(7, 8)  # other data: another run
    weights = trained.weights()
    recwarn.clear()
    assert trained.save(store, 3) == store.path(3)
    said = on_all_ranks([str(w.message) for w in recwarn if "went on from" in str(w.message)])
    assert [len(lines) for lines in said] == [1] + 7 * [0]
    assert store.steps() == [2, 3]
    aside = root / "abandoned" / "1" / "step_00000003"
    assert {p.name: p.read_bytes() for p in aside.iterdir()} == old
    trained.train(8, 9)
    again = trained.store(root)
    trained.load(again, 3)
    assert same(trained.weights(), weights)
    trained.load(again, 2)
    assert not same(trained.weights(), weights)
    assert again.steps() == [2, 3]
    dist.barrier()
    trained.save(again, 5)  # goes on from what was loaded last
    assert again.steps() == [2, 5]
    assert sorted(p.name for p in (root / "abandoned").iterdir()) == ["1", "2"]
