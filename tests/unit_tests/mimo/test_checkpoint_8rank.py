# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of the digits model on 8 ranks: exact, layout-free, and whole or absent.

Failures are injected into what rank 0 does alone (make room, publish) and into one rank's writer.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import json
import random
import re
import shutil
import sys
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "mimo" / "digits"
sys.path.insert(0, str(EXAMPLE))

from data import DigitsBatches  # noqa: E402
from layouts import Layout  # noqa: E402
from model import DigitsModel, ModelOptions, ModelSize, build_model  # noqa: E402
from trainer import Trainer, TrainOptions  # noqa: E402

from megatron.core.dist_checkpointing.strategies import filesystem_async  # noqa: E402
from megatron.core.models.mimo.training import checkpoint  # noqa: E402
from megatron.core.models.mimo.training.checkpoint import (  # noqa: E402
    FORMAT,
    MANIFEST,
    CheckpointError,
    CheckpointStore,
    remove_partial,
)
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker  # noqa: E402
from tests.unit_tests.mimo.tiny_modules import on_all_ranks  # noqa: E402

pytestmark = pytest.mark.ranks(8)

BATCH = 16
SIZE = ModelSize(
    vision_hidden=32,
    vision_layers=1,
    language_hidden=64,
    language_layers=1,
    language_query_groups=4,
)
FAN_IN = ("tp=2,dp=4", "tp=2,cp=2,dp=2")
FAN_OUT = ("tp=4,dp=2", "tp=1,cp=2,dp=4")
SHARDING = pytest.mark.parametrize("distributed", [False, True], ids=["whole", "sharded"])


@dataclass
class Run:
    """A run that trains, saves and loads."""

    built: DigitsModel
    trainer: Trainer

    def store(self, root: Path, **options: int) -> CheckpointStore:
        return CheckpointStore(root, self.built.layouts(), self.built.randomness, **options)

    def save(self, store: CheckpointStore, step: int) -> Path:
        return store.save(step, self.built.model, self.trainer.optimizer)

    def load(self, store: CheckpointStore, step: int) -> None:
        store.load(step, self.built.model, self.trainer.optimizer)
        self.trainer.resume_schedule(step)

    def train(self, start: int, stop: int) -> list[float]:
        """Losses of the steps; each must have moved the weights."""
        batches = DigitsBatches(7, "train", BATCH)
        results = [self.trainer.step(batches, step) for step in range(start, stop)]
        assert all(result.success for result in results)
        return [result.loss for result in results]

    def weights(self) -> dict[str, torch.Tensor]:
        return {n: p.detach().clone() for n, p in self.built.model.named_parameters()}

    def optimizer_state(self) -> list[torch.Tensor]:
        """What Adam remembers on this rank, its step counts included."""
        found = []
        for module in self.trainer.optimizer._active_optimizers:
            for inner in getattr(module, "chained_optimizers", [module]):
                for state in inner.optimizer.state.values():
                    found += [torch.as_tensor(state[key]).clone() for key in sorted(state)]
        return found


@contextlib.contextmanager
def run(pair: tuple[str, str], distributed: bool = True, seed: int = 5) -> Iterator[Run]:
    built = build_model(
        Layout.parse(pair[0], "vision"),
        Layout.parse(pair[1], "language"),
        ModelOptions(size=SIZE, seed=seed, distributed_optimizer=distributed),
    )
    options = TrainOptions(steps=10, global_batch_size=BATCH, warmup_steps=1)
    try:
        yield Run(built, Trainer(built, options, distributed))
    finally:
        dist.barrier()
        built.destroy()


@pytest.fixture(scope="module")
def trained() -> Iterator[Run]:
    """A run after one step, for tests that only save."""
    with run(FAN_IN) as one:
        one.train(0, 1)
        yield one


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return sorted(one) == sorted(other) and all(torch.equal(one[k], other[k]) for k in one)


def draws() -> list:
    """The next numbers of every generator of the process."""
    with get_cuda_rng_tracker().fork():
        forked = torch.rand(2).tolist()
    return [random.random(), float(np.random.rand()), torch.rand(2).tolist(), forked]


def files(root: Path) -> list[str]:
    """Everything below ``root``, once all ranks are here."""
    dist.barrier()
    found = sorted(str(p.relative_to(root)) for p in root.rglob("*")) if root.exists() else []
    dist.barrier()
    return found


def is_016() -> bool:
    return importlib.metadata.version("megatron-core").startswith("0.16.")


def only_rank_0(action: object) -> None:
    if dist.get_rank() == 0:
        action()
    dist.barrier()


# ---- what comes back --------------------------------------------------------------------------


@SHARDING
def test_the_same_layout_continues_bit_for_bit(distributed: bool, shared_tmp_path: Path) -> None:
    with run(FAN_IN, distributed) as first:
        first.train(0, 2)
        first.save(first.store(shared_tmp_path), 2)
        saved = first.weights(), first.optimizer_state(), first.built.randomness.get_states()
        numbers = draws()
        losses, last = first.train(2, 4), first.weights()
    with run(FAN_IN, distributed, seed=6) as second:
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
@pytest.mark.parametrize("pairs", [(FAN_IN, FAN_OUT), (FAN_OUT, FAN_IN)], ids=["in_out", "out_in"])
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
            torch.manual_seed(8)
            second.load(second.store(here), 2)
            own_generator = torch.rand(2)
            second.save(second.store(there), 2)
            # fp32 sums in another order.
            assert second.train(2, 4) == pytest.approx(losses, rel=1e-6)
        # Back again: what went through the other layout's shards is what left.
        first.load(first.store(there), 2)
        assert same(first.weights(), weights)
        assert all(torch.equal(a, b) for a, b in zip(first.optimizer_state(), state, strict=True))
    # A rank's random state has no counterpart in another layout.
    torch.manual_seed(8)
    assert torch.equal(torch.rand(2), own_generator)


def test_the_manifest_says_what_was_saved(trained: Run, shared_tmp_path: Path) -> None:
    store = trained.store(shared_tmp_path)
    path = store.save(3, trained.built.model, trained.trainer.optimizer, {"data": [1, "a"]})
    manifest = store.manifest(3)
    assert path == store.path(3)
    assert path.name == "step_00000003"
    assert (manifest.step, manifest.world_size, manifest.format) == (3, 8, FORMAT)
    assert manifest.layouts == trained.built.layouts()
    assert manifest.extra == {"data": [1, "a"]}
    embedding = [k for k in manifest.shapes if "word_embeddings" in k]
    assert manifest.shapes[embedding[0]][1] == SIZE.language_hidden
    assert store.same_layout(manifest)
    assert not CheckpointStore(shared_tmp_path, {}).same_layout(manifest)


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
    # 0.19's writers keep nothing of an error but its type.
    reason = "[Nn]o space left" if is_016() else "[Nn]o space left|OSError"
    assert re.search(rf"rank {rank} could not write checkpoint .*({reason})", message)
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
        monkeypatch.setattr(checkpoint, "_fsync", fail)
    elif broken == "rename":
        monkeypatch.setattr(checkpoint, "os", SimpleNamespace(rename=fail))
        monkeypatch.setattr(checkpoint, "_fsync", lambda _path: None)
    else:
        monkeypatch.setattr(Path, "write_text", fail)
    message = refused(trained, shared_tmp_path / "run")
    assert re.search(r"rank 0 could not complete checkpoint .*Input/output error", message)


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


def test_removing_leftovers_says_what_went(shared_tmp_path: Path) -> None:
    only_rank_0(lambda: (shared_tmp_path / ".saving_00000009").mkdir())
    removed = on_all_ranks(remove_partial(shared_tmp_path) if dist.get_rank() == 0 else None)
    assert removed[0] == [".saving_00000009"]
    assert remove_partial(shared_tmp_path / "absent") == []


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


def test_a_checkpoint_is_never_written_over(trained: Run, shared_tmp_path: Path) -> None:
    store = trained.store(shared_tmp_path)
    path = trained.save(store, 1)
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in path.iterdir()}
    dist.barrier()
    trained.train(1, 2)
    assert trained.save(store, 1) == path
    dist.barrier()
    assert {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in path.iterdir()} == before


# ---- what cannot be loaded --------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint_of_step_1(trained: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root of a store with the checkpoint of step 1, rank 0's on all ranks."""
    root = on_all_ranks(tmp_path_factory.mktemp("one"))[0]
    trained.save(trained.store(root), 1)
    return root


@pytest.fixture
def saved(trained: Run, checkpoint_of_step_1: Path, shared_tmp_path: Path) -> CheckpointStore:
    """A store with a copy of it, to be spoilt."""
    only_rank_0(lambda: shutil.copytree(checkpoint_of_step_1, shared_tmp_path, dirs_exist_ok=True))
    return trained.store(shared_tmp_path)


def edit(store: CheckpointStore, **changes: object) -> None:
    """Change entries of the manifest; ``None`` takes one away."""

    def change() -> None:
        file = store.path(1) / MANIFEST
        entries = {**json.loads(file.read_text()), **changes}
        file.write_text(json.dumps({k: v for k, v in entries.items() if v is not None}))

    only_rank_0(change)


def test_a_checkpoint_without_a_manifest_is_refused(saved: CheckpointStore, trained: Run) -> None:
    only_rank_0((saved.path(1) / MANIFEST).unlink)
    with pytest.raises(CheckpointError, match="step_00000001 cannot be read.*remove that folder"):
        trained.load(saved, 1)


def test_a_broken_manifest_is_refused(saved: CheckpointStore, trained: Run) -> None:
    only_rank_0(lambda: (saved.path(1) / MANIFEST).write_text('{"step": 1, '))
    with pytest.raises(CheckpointError, match="step_00000001 cannot be read.*remove that folder"):
        trained.load(saved, 1)


@pytest.mark.parametrize("change", [{"shapes": None}, {"unknown": 1}])
def test_a_manifest_with_other_entries_is_refused(
    change: dict, saved: CheckpointStore, trained: Run
) -> None:
    edit(saved, **change)
    with pytest.raises(CheckpointError, match="step_00000001 cannot be read"):
        trained.load(saved, 1)


def test_another_format_is_refused(saved: CheckpointStore, trained: Run) -> None:
    edit(saved, format=FORMAT + 1)
    with pytest.raises(
        CheckpointError, match=f"has format {FORMAT + 1}, this version reads format {FORMAT}"
    ):
        trained.load(saved, 1)


def test_a_checkpoint_of_another_model_is_refused(saved: CheckpointStore, trained: Run) -> None:
    before = trained.weights()
    shapes = saved.manifest(1).shapes
    name = sorted(shapes)[0]
    other = [size + 1 for size in shapes[name]]
    dist.barrier()
    edit(saved, shapes={**shapes, name: other})
    text = f"is of another model: '{name}' is {other} there and {shapes[name]} here"
    with pytest.raises(CheckpointError, match=re.escape(text)):
        trained.load(saved, 1)
    dist.barrier()
    edit(saved, shapes={k: v for k, v in shapes.items() if k != name})
    text = f"'{name}' is absent there and {shapes[name]} here"
    with pytest.raises(CheckpointError, match=re.escape(text)):
        trained.load(saved, 1)
    assert same(trained.weights(), before)


def test_a_step_that_was_never_saved_is_refused(saved: CheckpointStore, trained: Run) -> None:
    with pytest.raises(CheckpointError, match="step_00000077 cannot be read"):
        trained.load(saved, 77)
