# SPDX-License-Identifier: Apache-2.0
"""The files of an exported model: which there are, and what is on the disk before what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.core.models.mimo.huggingface import export, pieces
from megatron.core.models.mimo.huggingface.build import from_folder
from megatron.core.models.mimo.huggingface.folder import (
    Described,
    FolderError,
    ModelFolder,
)
from megatron.core.models.mimo.huggingface.safetensors_file import SafetensorsFile
from mimo_colocated.launch.layouts import Layout
from tests.unit_tests.mimo.huggingface import models
from tests.unit_tests.mimo.test_history import changes_of_the_disk


@pytest.mark.usefixtures("one_rank")
def test_what_is_on_the_disk_before_what(tmp_path: Path) -> None:
    """Every file before the folder's name; the name before the model that it replaces goes."""
    models.DENSE["qwen2"]().save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "sub").mkdir()
    for name in ("tokenizer.json", "sub/template.jinja"):
        (tmp_path / "source" / name).write_text("{}")
    old, new = tmp_path / "out", tmp_path / ".out.exporting"
    old.mkdir()
    (old / "config.json").write_text("{}")
    log: list[tuple[str, Path]] = []
    there: set[Path] = set()

    def note(what: str, path: Path) -> None:
        log.append((what, path))
        if (what, path) == ("rename", new):
            there.update(new.rglob("*"))

    built = from_folder(tmp_path / "source", {"language": Layout()})
    with changes_of_the_disk(note):
        export.to_folder(built, old, max_file_bytes=20_000, overwrite=True)
    built.destroy()
    shown = log.index(("rename", new))
    flushed = {path for what, path in log[:shown] if what == "fsync"}
    kinds = {path.suffix for path in there}
    assert {".safetensors", ".json", ".jinja"} <= kinds
    assert {new, *there} <= flushed
    assert log[shown - 1] == ("rename", old)
    assert log[shown + 1 :] == [("fsync", tmp_path), ("remove", tmp_path / ".out.replaced")]


class Source:
    def __init__(self, sizes: list[int]) -> None:
        self.tensors = {f"t{n}": Described("x", torch.int8, (s,)) for n, s in enumerate(sizes)}


@pytest.mark.parametrize(
    ("sizes", "limit", "wanted"),
    [
        ([3, 4, 5], None, None),
        ([3, 4, 5], 12, [[3, 4, 5]]),
        ([3, 4, 5], 11, [[3, 4], [5]]),
        ([3, 4, 5], 7, [[3, 4], [5]]),
        ([9, 1, 1, 9, 1], 3, [[9], [1, 1], [9], [1]]),
        ([0, 9, 0], 3, [[0], [9], [0]]),
        ([2, 2], 1, [[2], [2]]),
    ],
)
def test_files_are_full_and_none_is_empty(
    sizes: list[int], limit: int | None, wanted: list[list[int]] | None
) -> None:
    """A tensor that is larger than a file has one of its own, the first one too."""
    source: Any = Source(sizes)
    found = export._outline(source, limit)
    assert list(found) == list(source.tensors)
    if wanted is None:
        assert found == source.tensors
        return
    files: dict[str, list[int]] = {}
    for described in found.values():
        files.setdefault(described.file, []).append(described.size)
    assert list(files.values()) == wanted
    count = len(wanted)
    numbered = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    assert list(files) == (["model.safetensors"] if count == 1 else numbered)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_configuration_names_the_dtype_that_was_written(key: str) -> None:
    """By the name that this version of transformers gives it, and by that of older ones."""
    before = {key: "float32", "vision_config": {key: "float32", "size": 3}, "text": {key: None}}
    after = export._with_dtype(before, torch.bfloat16)
    vision = {key: "bfloat16", "size": 3}
    assert after == {key: "bfloat16", "vision_config": vision, "text": {key: None}}
    assert export._with_dtype(before, None) == before


def test_numbers_that_are_no_weights_keep_their_dtype() -> None:
    for dtype in (torch.int64, torch.int32, torch.uint8, torch.bool):
        described = Described("x", dtype, (2, 3))
        assert pieces._cast(described, torch.bfloat16) is described
    weight = Described("x", torch.float64, (2, 3))
    assert pieces._cast(weight, torch.bfloat16).dtype is torch.bfloat16
    assert pieces._cast(weight, None) is weight


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "the ranks have 0 of its 1 rows in order"),
        ([(0, 2)], "the ranks have 2 of its 4 rows in order"),
        ([(0, 2), (3, 1)], "the ranks have 2 of its 4 rows in order"),
        ([(1, 3)], "the ranks have 0 of its 4 rows in order"),
        ([(0, 4), (2, 2)], "the ranks have 4 of its 4 rows in order"),
        ([(0, 4)], None),
    ],
)
def test_a_tensor_that_ranks_have_in_part_is_not_written(
    rows: list[tuple[int, int]], said: str | None
) -> None:
    found = [pieces.Piece(start, size, 0, 0, 0, 0, 0) for start, size in rows]
    described = Described("x", torch.float32, (4, 3))
    if said is None:
        pieces._check_whole("w", described, found)
        return
    with pytest.raises(FolderError, match=rf"'w' \[4, 3\] cannot be written: {said}; the model's"):
        pieces._check_whole("w", described, found)


def test_a_file_takes_what_its_header_says(tmp_path: Path) -> None:
    described = Described("x.safetensors", torch.float32, (2, 2))
    for wrong in (torch.ones(2, 2, dtype=torch.float16), torch.ones(4)):
        file = SafetensorsFile(tmp_path / "x.safetensors", {"w": described}, {})
        with pytest.raises(ValueError, match=r"instead of Described\("):
            file.write(wrong)
        file.close()


@pytest.mark.parametrize("count", [-1, 1, 8], ids=["cut_short", "one_more", "grew"])
def test_a_file_of_another_size_than_its_header_tells_is_refused(
    count: int, tmp_path: Path
) -> None:
    models.DENSE["llama"]().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:count] if count < 0 else content + b"\0" * count)
    words = f"has {len(content) + count} bytes, its header tells of {len(content)}"
    with pytest.raises(FolderError, match=words):
        ModelFolder(tmp_path)
    file.write_bytes(content)
    with ModelFolder(tmp_path) as whole:
        assert "model.norm.weight" in whole.tensors
