# SPDX-License-Identifier: Apache-2.0
"""Folders as ``energon prepare`` leaves them, version 7.4: made here, so that it is not needed."""

from __future__ import annotations

import io
import json
import sqlite3
import tarfile
from pathlib import Path
from typing import Any

import pytest

from megatron.core.models.mimo.data.conversation import SampleError
from megatron.core.models.mimo.data.energon import EnergonFolder
from megatron.core.models.mimo.data.sources import Source, SourceError, open_source
from tests.unit_tests.mimo.data.small import png

pytestmark = pytest.mark.once

TABLES = """
    CREATE TABLE samples (tar_file_id INTEGER NOT NULL, sample_key TEXT NOT NULL UNIQUE,
        sample_index INTEGER NOT NULL, byte_offset INTEGER, byte_size INTEGER);
    CREATE TABLE sample_parts (tar_file_id INTEGER, sample_index INTEGER, part_name TEXT,
        content_byte_offset INTEGER, content_byte_size INTEGER);
"""
SHARDS = {"b/0.tar": ["b0", "b1"], "a.tar": ["a0", "a1", "a2"], "c.tar": ["c0"]}
SPLITS = {"split_parts": {"train": ["{b/0,a}.tar"], "val": ["c.tar"]}, "exclude": []}


def crude(key: str) -> dict[str, bytes]:
    shown = [{"type": "image", "image": "seen.png"}, {"type": "text", "text": f"what is {key}"}]
    said = [{"role": "user", "content": shown}, {"role": "assistant", "content": f"it is {key}"}]
    return {"json": json.dumps({"messages": said}).encode(), "seen.png": png(ord(key[1]))}


def vqa(key: str) -> dict[str, bytes]:
    said = {"asked": [f"what is {key}"], "answers": {"of": [f"it is {key}", "other"]}}
    return {"png": png(ord(key[1])), "json": json.dumps(said).encode()}


def captioned(key: str) -> dict[str, bytes]:
    return {"png": png(ord(key[1])), "txt": f"it is {key}".encode()}


def prepare(folder: Path, make: Any = crude, settings: Any = None, splits: Any = None) -> Path:
    """A folder as energon leaves it."""
    meta = folder / ".nv-meta"
    meta.mkdir(parents=True)
    database = sqlite3.connect(meta / "index.sqlite")
    database.executescript(TABLES)
    for shard, (name, keys) in enumerate(SHARDS.items()):
        (folder / name).parent.mkdir(exist_ok=True)
        with tarfile.open(folder / name, "w") as tar:
            for key in keys:
                for extension, content in make(key).items():
                    member = tarfile.TarInfo(f"{key}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        with tarfile.open(folder / name) as tar:
            for member in tar:
                key, _, part = member.name.partition(".")
                at = (shard, keys.index(key), part, member.offset_data, member.size)
                database.execute("INSERT INTO sample_parts VALUES (?, ?, ?, ?, ?)", at)
        for number, key in enumerate(keys):
            database.execute("INSERT INTO samples VALUES (?, ?, ?, 0, 0)", (shard, key, number))
    database.commit()
    database.close()
    counts = {name: len(keys) for name, keys in SHARDS.items()}
    (meta / ".info.json").write_text(json.dumps({"shard_counts": counts}))
    (meta / "split.yaml").write_text(json.dumps(splits or SPLITS))
    crude_type = {"sample_type": {"__module__": "megatron.energon", "__class__": "CrudeSample"}}
    (meta / "dataset.yaml").write_text(json.dumps(settings or crude_type))
    return folder


def of_type(name: str, **fields: str) -> dict[str, Any]:
    return {"sample_type": {"__module__": "megatron.energon", "__class__": name},
            "field_map": fields}  # fmt: skip


def said(source: Source) -> list[str]:
    found = []
    for number in range(len(source)):
        turns = source[number].turns
        assert [turn.role for turn in turns] == ["user", "assistant"]
        answer = turns[1].parts[0].text
        (item,) = source[number].items()
        key = answer.removeprefix("it is ")
        assert item.read() == png(ord(key[1]))
        asked = [part.text for part in turns[0].parts if part.kind == "text"]
        assert asked in ([], [f"what is {key}"])
        found.append(key)
    return found


def test_samples_of_a_split_in_the_order_of_the_shards(tmp_path: Path) -> None:
    folder = prepare(tmp_path / "made")
    source = open_source("energon", {"path": folder})
    assert said(source) == ["b0", "b1", "a0", "a1", "a2"]
    held_out = EnergonFolder(folder, split="val")
    assert said(held_out) == ["c0"]
    assert len({source.fingerprint(), held_out.fingerprint()}) == 2
    with pytest.raises(IndexError, match=r"sample 5 is not in 0\.\.4"):
        source[5]


def test_what_is_excluded_is_left_out(tmp_path: Path) -> None:
    without = ["a.tar/a1", "b/0.tar", "c.tar/a2"]
    splits = {"split_parts": {"train": list(SHARDS)}, "exclude": without}
    source = open_source("energon", {"path": prepare(tmp_path / "made", splits=splits)})
    assert said(source) == ["a0", "a2", "c0"]


def test_questions_and_captions_are_found_by_the_field_map(tmp_path: Path) -> None:
    fields = {"image": "png", "context": "json[asked][0]", "answers": "json[answers][of]"}
    folder = prepare(tmp_path / "vqa", vqa, of_type("VQASample", **fields))
    assert said(open_source("energon", {"path": folder})) == ["b0", "b1", "a0", "a1", "a2"]
    settings = of_type("CaptioningSample", image="png", caption="txt")
    folder = prepare(tmp_path / "captions", captioned, settings)
    assert said(open_source("energon", {"path": folder, "split": "val"})) == ["c0"]


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"image": "jpg"}, "has no .jpg"),
        ({"context": "txt"}, "has no .txt"),
        ({"context": "json[nothing]"}, r"c0.json of .*c.tar has no json\[nothing\]"),
        ({"answers": "json[answers]"}, r"c0.json of .*c.tar has no text at json\[answers\]"),
        ({"answers": "json[asked][one]"}, r"c0.json of .*c.tar has no json\[asked\]\[one\]"),
    ],
)
def test_fields_that_a_sample_lacks_are_malformed(
    tmp_path: Path, fields: dict[str, str], wrong: str
) -> None:
    right = {"image": "png", "context": "json[asked]", "answers": "json[answers][of]"}
    folder = prepare(tmp_path / "made", vqa, of_type("VQASample", **{**right, **fields}))
    with pytest.raises(SampleError, match=wrong) as caught:
        open_source("energon", {"path": folder, "split": "val"})[0]
    assert caught.value.reason == "malformed"


def test_folders_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"index\.sqlite; prepare it with `energon prepare`"):
        open_source("energon", {"path": tmp_path})
    folder = prepare(tmp_path / "made")
    with pytest.raises(SourceError, match="has no split 'dev'; it has train, val"):
        open_source("energon", {"path": folder, "split": "dev"})
    meta = folder / ".nv-meta"
    for name, content, wrong in (
        ("split.yaml", '{"split_parts": {"train": []}}', "no shard in its split 'train'"),
        ("split.yaml", '{"split_parts": {"train": ["d.tar"]}}', "was prepared without d.tar"),
        ("split.yaml", "[", "split.yaml cannot be read: while parsing"),
        ("split.yaml", "3", "split.yaml holds int, not names and values"),
        ("dataset.yaml", json.dumps(of_type("OCRSample")), "samples of type OCRSample with"),
        ("dataset.yaml", json.dumps(of_type("VQASample", image="png")), "VQASample with the field"),
        ("index.sqlite", "no database", "index.sqlite cannot be read: file is not a database"),
    ):
        before = (meta / name).read_bytes()
        (meta / name).write_text(content)
        with pytest.raises(SourceError, match=wrong):
            open_source("energon", {"path": folder})
        (meta / name).write_bytes(before)
    (meta / "split.yaml").unlink()
    with pytest.raises(SourceError, match=r"has no split\.yaml; prepare it anew"):
        open_source("energon", {"path": folder})
