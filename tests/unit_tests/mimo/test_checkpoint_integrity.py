# SPDX-License-Identifier: Apache-2.0
"""Digests and manifests of checkpoints, in one process."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from megatron.core.models.mimo.checkpoint import integrity
from megatron.core.models.mimo.checkpoint.integrity import DamagedFile
from megatron.core.models.mimo.checkpoint.manifest import Manifest

MANIFEST = Manifest(3, {"language": {"tp": 2}}, 8, {"weight": [4, 4]}, {"lr": 0.1}, {})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "b").write_bytes(b"")
    return tmp_path


# One piece, several pieces and a rest, exactly two pieces.
@pytest.mark.parametrize("size", [0, 1, 9 << 20, 8 << 20])
def test_the_digest_is_that_of_all_bytes(size: int, tmp_path: Path) -> None:
    content = bytes(i % 251 for i in range(1000)) * (size // 1000 + 1)
    (tmp_path / "file").write_bytes(content[:size])
    assert integrity.sha256(tmp_path / "file") == hashlib.sha256(content[:size]).hexdigest()


def test_what_is_unchanged_passes(folder: Path) -> None:
    files = integrity.describe(folder, ["a", "b"])
    assert files["a"] == {"bytes": 3, "sha256": hashlib.sha256(b"abc").hexdigest()}
    integrity.check(folder, files)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"abd", "a is damaged, its bytes are not those saved"),
        (b"ab", "a has 2 bytes, 3 were saved"),
        (b"abc\0", "a has 4 bytes, 3 were saved"),
        (None, "a is missing"),
    ],
)
@pytest.mark.parametrize("digests", [True, False])
def test_what_is_changed_is_named(
    content: bytes | None, words: str, digests: bool, folder: Path
) -> None:
    files = integrity.describe(folder, ["b", "a"])
    (folder / "a").unlink()
    if content is not None:
        (folder / "a").write_bytes(content)
    if not digests and content == b"abd":  # nobody looked
        integrity.check(folder, files, digests=False)
        return
    with pytest.raises(DamagedFile, match=f"{folder}/{words}"):
        integrity.check(folder, files, digests=digests)


def test_an_empty_file_that_grew_is_named(folder: Path) -> None:
    files = integrity.describe(folder, ["b"], digests=False)
    (folder / "b").write_bytes(b"x")
    with pytest.raises(DamagedFile, match="b has 1 bytes, 0 were saved"):
        integrity.check(folder, files, digests=False)


def test_sizes_alone_can_be_recorded(folder: Path) -> None:
    files = integrity.describe(folder, ["a"], digests=False)
    assert files == {"a": {"bytes": 3, "sha256": None}}
    integrity.check(folder, files)


@pytest.mark.parametrize("world", [1, 3, 8, 40])
def test_every_file_has_one_reader(world: int) -> None:
    sizes = {f"__{rank}_{part}.distcp": rank * 7 + part for rank in range(8) for part in range(2)}
    sizes |= {".metadata": 11, "common.pt": 3, "metadata.json": 0}
    shares = [integrity.share(rank, world, sizes) for rank in range(world)]
    assert sorted(sum(shares, [])) == sorted(sizes)


def test_shares_are_even() -> None:
    sizes = {str(i): 1 + i % 5 for i in range(64)}
    loads = [sum(sizes[n] for n in integrity.share(rank, 8, sizes)) for rank in range(8)]
    # No share exceeds the mean by more than one file.
    assert max(loads) <= sum(sizes.values()) / 8 + max(sizes.values())
    assert min(loads) >= max(loads) - max(sizes.values())


def test_empty_files_are_shared_out_too() -> None:
    sizes = {str(i): 0 for i in range(16)}
    assert [len(integrity.share(rank, 8, sizes)) for rank in range(8)] == [2] * 8


def test_a_manifest_comes_back_as_it_was() -> None:
    assert Manifest.from_json(MANIFEST.to_json()) == MANIFEST


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"step": 4}, "damaged"),
        ({"digest": None, "files": {"a": {}}}, "does not say what its files hold"),
        ({"digest": None, "shapes": 3}, "names no shapes"),
    ],
)
def test_a_changed_manifest_is_refused(change: dict, error: str) -> None:
    entries = {**json.loads(MANIFEST.to_json()), **change}
    with pytest.raises(ValueError, match=f"mimo.json.*{error}"):
        Manifest.from_json(json.dumps(entries))


@pytest.mark.parametrize("text", ["[]", "3", "{"])
def test_a_manifest_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        Manifest.from_json(text)


def test_a_manifest_older_than_digests_is_read() -> None:
    entries = json.loads(MANIFEST.to_json())
    with pytest.raises(ValueError, match="mimo.json is damaged"):  # a digest that says nothing
        Manifest.from_json(MANIFEST.to_json().replace(entries["digest"], ""))
    del entries["digest"], entries["files"]
    assert Manifest.from_json(json.dumps(entries)).files is None
