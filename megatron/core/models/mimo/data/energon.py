# SPDX-License-Identifier: Apache-2.0
"""Folders that ``energon prepare`` made, read by number: tar shards and energon's index of them.

Megatron-Energon itself is not needed: its index is a table of SQLite, its settings are YAML.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import sqlite3
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron.core.models.mimo.data.conversation import (
    Conversation,
    Part,
    SampleError,
    StretchItem,
    Turn,
    text,
)
from megatron.core.models.mimo.data.kept_arrays import kept_arrays
from megatron.core.models.mimo.data.sources import SourceError, fingerprint_of
from megatron.core.models.mimo.data.tar_shards import Members, Table, conversation_of, json_of

_ASKED = {"VQASample": ("context", "answers"), "CaptioningSample": ("", "caption")}
"""Energon's type of a sample -> the fields that are asked and answered."""
_MEMBERS = """
    SELECT tar_file_id, sample_index, content_byte_offset, content_byte_size,
           sample_key || '.' || part_name, sample_key
    FROM sample_parts JOIN samples USING (tar_file_id, sample_index)
    ORDER BY tar_file_id, sample_index, content_byte_offset
"""


class EnergonFolder:
    """Samples of a split, in the order of the shards.

    A sample is a conversation, ``KEY.json`` with messages as in WebDataset shards, unless
    ``dataset.yaml`` says that it is a ``VQASample`` or a ``CaptioningSample``: an image with a
    question and its first answer, or with a caption, found by its ``field_map``.

    Args:
        path: of the folder, with ``.nv-meta`` in it.
        split: of ``split.yaml``.

    Raises:
        SourceError: the folder is not prepared, there is no such split, or samples are of a type
            that is no conversation.
    """

    def __init__(self, path: str | Path, split: str = "train") -> None:
        self._folder = Path(path).expanduser()
        meta, index = self._folder / ".nv-meta", self._folder / ".nv-meta" / "index.sqlite"
        if not index.is_file():
            raise SourceError(
                f"{path} has no .nv-meta/index.sqlite; prepare it with `energon prepare`, version "
                "7 or newer"
            )
        names = list(_settings(meta, ".info.json", ".info.yaml")["shard_counts"])
        chosen = _chosen(_settings(meta, "split.yaml", "split.json"), split, path)
        unknown = sorted(name for name in chosen - set(names) if not name.startswith("-"))
        if unknown:
            raise SourceError(f"{path} was prepared without {unknown[0]}; prepare it anew")
        self._fields = _fields(_settings(meta, "dataset.yaml"), path)
        self._shards = [self._folder / name for name in names]
        self._said = {"split": split, "chosen": sorted(chosen), "fields": self._fields}
        self._read = [index, *(self._folder / name for name in names if name in chosen)]
        found = kept_arrays(
            meta / f"samples-{split}.index",
            repr(self._said),
            self._read,
            lambda: _found(index, names, chosen),
        )
        self._members = Members(self._shards, found)

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, number: int) -> Conversation:
        members = self._members[number]
        if self._fields is None:
            return conversation_of(members)
        image, asked, answered = self._fields
        if image not in members:
            name = next(iter(members.values())).name
            raise SampleError("malformed", f"the sample of {name} has no .{image}")
        question = (text(_field(members, asked)),) if asked else ()
        return Conversation(
            (
                Turn("user", (Part("image", "", members[image]), *question)),
                Turn("assistant", (text(_field(members, answered)),)),
            )
        )

    def fingerprint(self) -> str:
        """Return text that changes when a shard is written, or the folder prepared anew."""
        return fingerprint_of(self._read, self._said)


def _settings(folder: Path, *names: str) -> dict[str, Any]:
    """What the first of the files that is there holds."""
    import yaml

    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise SourceError(f"{folder} has no {names[0]}; prepare it anew with `energon prepare`")
    try:
        content = path.read_text(encoding="utf-8")
        found = json.loads(content) if path.suffix == ".json" else yaml.safe_load(content)
    except (yaml.YAMLError, ValueError) as error:
        raise SourceError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise SourceError(f"{path} holds {type(found).__name__}, not names and values")
    return found


def _chosen(splits: Mapping[str, Any], split: str, path: str | Path) -> set[str]:
    """The shards of a split, and ``SHARD/KEY`` of samples that are not in it, with a ``-``."""
    from braceexpand import braceexpand

    parts = splits.get("split_parts") or {}
    if split not in parts:
        raise SourceError(f"{path} has no split {split!r}; it has {', '.join(parts) or 'none'}")
    shards, without = (
        {name for pattern in patterns for name in braceexpand(pattern)}
        for patterns in (parts[split], splits.get("exclude") or ())
    )
    if not shards - without:
        raise SourceError(f"{path} has no shard in its split {split!r}; take another one")
    return (shards - without) | {f"-{name}" for name in without - shards}


def _fields(settings: Mapping[str, Any], path: str | Path) -> tuple[str, str, str] | None:
    """Where image, question and answer of a sample are; None if its messages say."""
    kind = (settings.get("sample_type") or {}).get("__class__", "CrudeSample")
    if kind == "CrudeSample":
        return None
    fields = settings.get("field_map") or {}
    asked, answered = _ASKED.get(kind, ("", ""))
    needed = [name for name in ("image", asked, answered) if name]
    if kind not in _ASKED or any(not _is_place(fields.get(name)) for name in needed):
        raise SourceError(
            f"{path} has samples of type {kind} with the field_map {fields}; what is read is "
            f"CrudeSample, whose .json has messages, and {' and '.join(_ASKED)} with a field_map "
            "of theirs in .nv-meta/dataset.yaml"
        )
    return fields["image"], fields.get(asked, ""), fields[answered]


def _is_place(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip("[]"))


def _field(members: Mapping[str, StretchItem], place: str) -> str:
    """The text at ``txt`` or ``json[name][0]``; of a list the first."""
    extension, *within = re.findall(r"[^\[\]]+", place)
    if extension == "txt" and extension in members:
        return members[extension].read().decode("utf-8", "replace")
    found = json_of(members, extension)
    for name in within:
        try:
            found = found[int(name) if isinstance(found, list) else name]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise SampleError("malformed", f"{members[extension].name} has no {place}") from error
    found = found[0] if isinstance(found, list) and found else found
    if not isinstance(found, str):
        raise SampleError("malformed", f"{members[extension].name} has no text at {place}")
    return found


def _found(index: Path, names: Sequence[str], chosen: Collection[str]) -> list[np.ndarray]:
    """What :class:`Members` is made of."""
    table = Table()
    for _, rows in itertools.groupby(_rows(index), key=lambda row: row[:2]):
        sample = list(rows)
        shard, key = names[sample[0][0]], sample[0][5]
        if shard in chosen and f"-{shard}/{key}" not in chosen:
            table.add((number, start, size, name) for number, _, start, size, name, _ in sample)
    return table.arrays()


def _rows(index: Path) -> Iterator[tuple[int, int, int, int, str, str]]:
    uri = f"{index.resolve().as_uri()}?mode=ro"
    try:
        with contextlib.closing(sqlite3.connect(uri, uri=True)) as database:
            yield from database.execute(_MEMBERS)
    except sqlite3.Error as error:
        raise SourceError(
            f"{index} cannot be read: {error}; prepare the folder anew with `energon prepare`, "
            "version 7 or newer"
        ) from error
