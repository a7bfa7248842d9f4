# SPDX-License-Identifier: Apache-2.0
"""Which pickles pass, in one process; every refused one is tried with what it would do."""

from __future__ import annotations

import io
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron.core.models.mimo.checkpoint import safe_pickles
from megatron.core.models.mimo.checkpoint.safe_pickles import StoredObject, UnsafeFile

pytestmark = pytest.mark.once


def metadata(**place: object) -> Metadata:
    """Of one tensor and one object."""
    chunk = ChunkStorageMetadata(torch.Size([0]), torch.Size([4]))
    tensor = TensorStorageMetadata(TensorProperties(dtype=torch.bfloat16), torch.Size([4]), [chunk])
    where = {"relative_path": "__0_0.distcp", "offset": 7, "length": 20, **place}
    return Metadata(
        {"weight": tensor, "rng": BytesStorageMetadata()},
        storage_data={
            MetadataIndex("weight", torch.Size([0]), 0): _StorageInfo("__1_0.distcp", 0, 16),
            MetadataIndex("rng"): _StorageInfo(**where),
        },
        storage_meta=StorageMeta(checkpoint_id=Path("/somewhere")),
    )


def refused(folder: Path, content: bytes) -> str:
    (folder / ".metadata").write_bytes(content)
    with pytest.raises(UnsafeFile) as caught:
        safe_pickles.rehearse_metadata(folder / ".metadata")
    assert str(folder / ".metadata") in str(caught.value)
    assert caught.value.__cause__ is None  # the innermost cause is what users are told
    return str(caught.value)


@pytest.mark.parametrize("protocol", range(6))
def test_metadata_passes_and_tells_where_objects_lie(protocol: int, tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata(), protocol))
    if protocol < 2:  # copyreg's way of building, which nobody writes
        with pytest.raises(UnsafeFile, match="names copy_reg._reconstructor"):
            safe_pickles.rehearse_metadata(tmp_path / ".metadata")
        return
    found = safe_pickles.rehearse_metadata(tmp_path / ".metadata")
    assert found == [StoredObject("rng", "__0_0.distcp", 7, 20)]


class Calls:
    """Unpickles to ``function(*arguments)``."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


@pytest.mark.parametrize("name", ["root", "inside", "key"])
def test_calls_are_not_made(name: str, tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    call = Calls(os.mkdir, str(witness))
    content = metadata()
    if name == "inside":
        content.planner_data = {"a": [call]}
    elif name == "key":
        content.storage_data[MetadataIndex(call)] = _StorageInfo("__0_0.distcp", 0, 1)
    text = refused(tmp_path, pickle.dumps(call if name == "root" else content))
    assert "names posix.mkdir, which is no part of a checkpoint" in text
    assert not witness.exists()


@pytest.mark.parametrize(
    "name",
    [
        "torch load",
        "torch.storage _load_from_bytes",
        "torch._utils _rebuild_tensor_v2",
        "torch.distributed.checkpoint.metadata os.system",
        "torch.distributed.checkpoint.metadata os",
        "builtins eval",
        "pickle loads",
    ],
)
def test_names_that_are_not_needed_are_refused(name: str, tmp_path: Path) -> None:
    text = refused(tmp_path, f"c{name.replace(' ', chr(10), 1)}\n.".encode())
    assert f"names {name.replace(' ', '.', 1)}," in text


def class_state(module: str, name: str) -> bytes:
    """A class, not one of it, given the state {"offset": torch.Size} as if it had slots."""
    return f"c{module}\n{name}\n(N}}(Voffset\nctorch\nSize\nutb.".encode()


class Victim:
    """Its class is changed by an unpickled state."""


def test_classes_are_not_changed(tmp_path: Path) -> None:
    pickle.loads(class_state(__name__, "Victim"))
    assert Victim.offset is torch.Size  # so it does work
    text = refused(tmp_path, class_state("torch.distributed.checkpoint.metadata", "MetadataIndex"))
    assert "TypeError" in text
    assert MetadataIndex.offset is None


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ({"relative_path": "../other"}, "reader to '../other', outside its folder"),
        ({"relative_path": "/etc/passwd"}, "outside its folder"),
        ({"relative_path": ".."}, "outside its folder"),
        ({"relative_path": 3}, "outside its folder"),
        ({"offset": -1}, r"reader to bytes -1 \+ 20 of __0_0.distcp"),
        ({"length": -1}, r"reader to bytes 7 \+ -1 of __0_0.distcp"),
        ({"length": "20"}, r"reader to bytes 7 \+ '20'"),
        ({"transform_descriptors": ["zstd"]}, "transformed, which is not supported"),
    ],
)
def test_places_outside_the_files_are_refused(place: dict, words: str, tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata(**place)))
    with pytest.raises(UnsafeFile, match=words):
        safe_pickles.rehearse_metadata(tmp_path / ".metadata")


def test_an_object_cannot_hide_behind_another_description(tmp_path: Path) -> None:
    content = metadata()
    content.state_dict_metadata = {"weight": content.state_dict_metadata["weight"]}
    (tmp_path / ".metadata").write_bytes(pickle.dumps(content))
    assert [o.key for o in safe_pickles.rehearse_metadata(tmp_path / ".metadata")] == ["rng"]


class Constructed:
    """Unpickles to a ``_StorageInfo`` made by its constructor instead of a state."""

    def __reduce__(self) -> tuple:
        return _StorageInfo, ("__0_0.distcp", 0, 10)


def test_places_given_in_another_way_are_refused(tmp_path: Path) -> None:
    content = metadata()
    content.storage_data[MetadataIndex("rng")] = Constructed()
    assert "builds _StorageInfo in a way that no writer does" in refused(
        tmp_path, pickle.dumps(content)
    )


def test_a_second_state_adds_to_the_first(tmp_path: Path) -> None:
    """As it does where the loader reads it: what the first one says still counts."""
    new = b"ctorch.distributed.checkpoint.filesystem\n_StorageInfo\n)\x81"
    first = b"}(Vrelative_path\nV../other\nVoffset\nI0\nVlength\nI9\nub"
    content = new + first + b"}Voffset\nI7\nsb."
    assert vars(pickle.loads(content)) == {"relative_path": "../other", "offset": 7, "length": 9}
    found = safe_pickles._Rehearsal(io.BytesIO(content)).load()
    assert found.fields() == vars(pickle.loads(content))


@pytest.mark.parametrize("content", [b"", b"junk", pickle.dumps(metadata())[:-20], b"I3\n."])
def test_what_is_no_metadata_is_refused(content: bytes, tmp_path: Path) -> None:
    assert "is not the metadata of a checkpoint" in refused(tmp_path, content)


# ---- objects ----------------------------------------------------------------------------------


def stored(folder: Path, value: object) -> StoredObject:
    content = io.BytesIO()
    torch.save(value, content)
    (folder / "__0_0.distcp").write_bytes(b"before" + content.getvalue() + b"behind")
    return StoredObject("rng", "__0_0.distcp", 6, len(content.getvalue()))


def test_objects_of_a_checkpoint_pass(tmp_path: Path) -> None:
    value = [{"tensor": torch.ones(3), "numbers": (1, 2.5, None), "bytes": io.BytesIO(b"a")}]
    safe_pickles.check_object(tmp_path, stored(tmp_path, value))


def test_objects_that_call_are_refused(tmp_path: Path) -> None:
    place = stored(tmp_path, [Calls(os.mkdir, str(tmp_path / "witness"))])
    words = r"__0_0.distcp \('rng'\) is not loaded, it names posix.mkdir, which no checkpoint needs"
    with pytest.raises(UnsafeFile, match=words):
        safe_pickles.check_object(tmp_path, place)
    assert not (tmp_path / "witness").exists()


def test_objects_in_another_format_are_refused(tmp_path: Path) -> None:
    content = io.BytesIO()
    torch.save({}, content, _use_new_zipfile_serialization=False)
    (tmp_path / "common.pt").write_bytes(content.getvalue())
    with pytest.raises(UnsafeFile, match="common.pt is not loaded, it is not what torch.save"):
        safe_pickles.check_common(tmp_path / "common.pt")


def test_programs_are_refused(tmp_path: Path) -> None:
    torch.jit.script(torch.nn.Identity()).save(str(tmp_path / "common.pt"))
    with pytest.raises(UnsafeFile, match="common.pt is not loaded, PyTorch refuses it"):
        safe_pickles.check_common(tmp_path / "common.pt")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (json.dumps({"sharded_backend": "zarr"}), "sharded_backend is 'zarr', supported is"),
        (json.dumps({"common_backend": "other"}), "common_backend is 'other', supported is"),
        ("{", "metadata.json is not loaded"),
        ("[1]", "metadata.json is not loaded"),
    ],
)
def test_another_format_is_refused(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "metadata.json").write_text(text)
    with pytest.raises(UnsafeFile, match=words):
        safe_pickles.check_format(tmp_path / "metadata.json")


# ---- a whole checkpoint -----------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 5])
def test_all_ranks_together_check_every_object(world: int, tmp_path: Path) -> None:
    """Whichever of three objects would run code, one rank refuses it."""
    (tmp_path / "metadata.json").write_text("{}")
    for bad in (1, 2, 3):
        content = metadata()
        content.storage_data = {}
        for number in (1, 2, 3):
            value = Calls(os.mkdir, str(tmp_path / "witness")) if number == bad else 1.0
            place = stored(tmp_path, value)
            (tmp_path / place.file).rename(tmp_path / f"__{number}_0.distcp")
            where = _StorageInfo(f"__{number}_0.distcp", place.offset, place.length)
            content.storage_data[MetadataIndex("rng", torch.Size([number]), number)] = where
        (tmp_path / ".metadata").write_bytes(pickle.dumps(content))
        refusals = []
        for rank in range(world):
            try:
                safe_pickles.check(tmp_path, rank, world)
            except UnsafeFile as error:
                refusals.append(str(error))
        assert len(refusals) == 1
        assert f"__{bad}_0.distcp ('rng') is not loaded, it names posix.mkdir" in refusals[0]
    assert not (tmp_path / "witness").exists()
