# SPDX-License-Identifier: Apache-2.0
"""What must not be loaded, on 8 ranks: another model, incomplete, damaged, malicious files.

The error is the same on every rank and names what is wrong; model and optimizer stay as they were.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader

from megatron.core.models.mimo.checkpoint import integrity, safe_pickles
from megatron.core.models.mimo.checkpoint.store import (
    FORMAT,
    MANIFEST,
    CheckpointError,
    CheckpointStore,
)
from tests.unit_tests.mimo.digits_runs import Run, only_rank_0, same
from tests.unit_tests.mimo.tiny_modules import on_all_ranks

pytestmark = pytest.mark.ranks(8)

# An object that is unpickled: the random states of rank 5.
RANDOM = "rng/shard_5_8"


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
    """Change entries of the manifest, which then has no digest; ``None`` takes one away."""

    def change() -> None:
        file = store.path(1) / MANIFEST
        entries = {**json.loads(file.read_text()), "digest": None, **changes}
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


def test_a_checkpoint_of_another_kind_of_optimizer_is_refused(
    saved: CheckpointStore, trained: Run
) -> None:
    assert saved.manifest(1).distributed_optimizer is True
    dist.barrier()
    edit(saved, distributed_optimizer=False)
    words = "was saved with the plain optimizer, this run has the distributed optimizer; go on with"
    assert words in refused(saved, trained)


def test_a_step_that_was_never_saved_is_refused(saved: CheckpointStore, trained: Run) -> None:
    with pytest.raises(CheckpointError, match="step_00000077 cannot be read"):
        trained.load(saved, 77)


# ---- damaged files ----------------------------------------------------------------------------


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def shorten(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def refused(store: CheckpointStore, trained: Run) -> str:
    """The error, the same on all ranks; nothing was loaded."""
    before, state = trained.weights(), trained.optimizer_state()
    with pytest.raises(CheckpointError) as caught:
        trained.load(store, 1)
    messages = on_all_ranks(str(caught.value))
    assert len(set(messages)) == 1
    assert same(trained.weights(), before)
    assert all(map(torch.equal, trained.optimizer_state(), state))
    return messages[0]


DAMAGE = {
    "flipped": (flip_a_byte, "{file} is damaged, its bytes are not those saved"),
    "shortened": (shorten, "{file} has {short} bytes, {size} were saved"),
    "missing": (Path.unlink, "{file} is missing"),
}


@pytest.mark.parametrize("name", ["__3_0.distcp", ".metadata", "metadata.json"])
@pytest.mark.parametrize("damage", list(DAMAGE))
def test_a_damaged_file_is_named(
    damage: str, name: str, saved: CheckpointStore, trained: Run
) -> None:
    spoil, words = DAMAGE[damage]
    file = saved.path(1) / name
    size = file.stat().st_size
    dist.barrier()
    only_rank_0(lambda: spoil(file))
    message = refused(saved, trained)
    words = words.format(file=file, size=size, short=size - 1)
    text = rf"rank \d could not read checkpoint {re.escape(str(saved.path(1)))}: {re.escape(words)}"
    assert re.fullmatch(f"{text}; remove that folder to use an earlier one", message)


def test_every_file_of_a_checkpoint_is_covered(saved: CheckpointStore) -> None:
    names = {path.name for path in saved.path(1).iterdir()}
    assert set(saved.manifest(1).files) == names - {MANIFEST}


def test_a_damaged_manifest_is_refused(saved: CheckpointStore, trained: Run) -> None:
    file = saved.path(1) / MANIFEST
    # Still JSON, still of the same model; the random states would silently not be restored.
    only_rank_0(lambda: file.write_text(file.read_text().replace('"dp": 4', '"dp": 5', 1)))
    assert "mimo.json is damaged: it is not what was written" in refused(saved, trained)


def test_without_digests_sizes_are_still_compared(saved: CheckpointStore, trained: Run) -> None:
    quick = CheckpointStore(saved.root, trained.built.layouts(), digests=False)
    file = saved.path(1) / "__3_0.distcp"
    only_rank_0(lambda: shorten(file))
    assert f"{file} has" in refused(quick, trained)


def test_digests_can_be_left_out(trained: Run, shared_tmp_path: Path) -> None:
    store = trained.store(shared_tmp_path, digests=False)
    trained.save(store, 1)
    saved = store.manifest(1).files["__3_0.distcp"]
    assert saved == {"bytes": (store.path(1) / "__3_0.distcp").stat().st_size, "sha256": None}
    trained.load(trained.store(shared_tmp_path), 1)


def test_a_checkpoint_older_than_digests_loads_with_a_warning(
    saved: CheckpointStore, trained: Run, recwarn: pytest.WarningsRecorder
) -> None:
    edit(saved, files=None)
    trained.load(saved, 1)
    found = [str(w.message) for w in recwarn if "saved without digests" in str(w.message)]
    assert [len(each) for each in on_all_ranks(found)] == [1, 0, 0, 0, 0, 0, 0, 0]


# ---- malicious files --------------------------------------------------------------------------


class Payload:
    """Creates ``witness`` when it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.witness),)


def in_metadata(folder: Path, witness: Path) -> str:
    content = pickle.loads((folder / ".metadata").read_bytes())
    content.planner_data = Payload(witness)
    (folder / ".metadata").write_bytes(pickle.dumps(content))
    return ".metadata"


def in_an_object(folder: Path, witness: Path) -> str:
    """In place of a rank's random states; it is shorter, zip files may have a tail."""
    found = safe_pickles.rehearse_metadata(folder / ".metadata")
    place = next(each for each in found if each.key == RANDOM)
    content = io.BytesIO()
    torch.save([Payload(witness)], content)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for index, stored in metadata.storage_data.items():
        if index.fqn == place.key:
            stored.length = len(content.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    file = folder / place.file
    kept = file.read_bytes()
    file.write_bytes(kept[: place.offset] + content.getvalue() + kept[place.offset :])
    return place.file


def in_common(folder: Path, witness: Path) -> str:
    torch.save({"state": Payload(witness)}, folder / "common.pt")
    return "common.pt"


def test_metadata_of_one_rank_is_refused(saved: CheckpointStore, trained: Run) -> None:
    """Stock reads it, unchecked, where it cannot read the metadata of all."""
    file = saved.path(1) / "__0.metadata"
    only_rank_0(lambda: shutil.copy(saved.path(1) / ".metadata", file))
    assert f"{file} is not loaded, metadata belongs in .metadata" in refused(saved, trained)


@pytest.mark.parametrize("digests", [True, False], ids=["digests", "older"])
@pytest.mark.parametrize("plant", [in_metadata, in_an_object, in_common])
def test_loading_executes_nothing(
    plant: Callable, digests: bool, saved: CheckpointStore, trained: Run
) -> None:
    folder, witness = saved.path(1), saved.root / "executed"
    name = on_all_ranks(plant(folder, witness) if dist.get_rank() == 0 else None)[0]
    # Who can write the files can write the manifest: with the right digests, or with none.
    files = integrity.describe(folder, [p.name for p in folder.iterdir() if p.name != MANIFEST])
    dist.barrier()
    edit(saved, files=files if digests else None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is an older one
        message = refused(saved, trained)
    path = re.escape(str(folder / name))
    assert re.search(rf"{path}.* not loaded.* names posix\.mkdir", message)
    assert not witness.exists()


def test_the_payload_would_be_executed(saved: CheckpointStore) -> None:
    """By the loaders that are underneath; else the test above could not fail."""

    def execute() -> None:
        in_an_object(saved.path(1), saved.root / "object")
        dcp.load(
            {RANDOM: io.BytesIO()}, storage_reader=FileSystemReader(saved.path(1)), no_dist=True
        )
        in_metadata(saved.path(1), saved.root / "metadata")
        FileSystemReader(saved.path(1)).read_metadata()
        assert (saved.root / "object").exists()
        assert (saved.root / "metadata").exists()

    only_rank_0(execute)
