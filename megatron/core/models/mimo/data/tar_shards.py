# SPDX-License-Identifier: Apache-2.0
"""WebDataset tar shards, read by number: headers once, contents where they lie."""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron.core.models.mimo.data.conversation import (
    Conversation,
    SampleError,
    StretchItem,
)
from megatron.core.models.mimo.data.kept_arrays import kept_arrays
from megatron.core.models.mimo.data.messages import from_messages
from megatron.core.models.mimo.data.sources import SourceError, fingerprint_of

_HEADER = 512
_TEXT = "json"


class TarShards:
    """Samples of members ``KEY.json``, with messages, and ``KEY.EXTENSION``, their items.

    A part of an image names its member by the extension, ``{"type": "image", "image": "0.png"}``.
    Where members lie is found once and kept beside the shards.

    Args:
        path: a tar, or a pattern of several, such as ``data/train-*.tar``.

    Raises:
        SourceError: nothing is there, or the package is missing.
    """

    def __init__(self, path: str | Path) -> None:
        self._shards = sorted(Path(name) for name in glob.glob(str(Path(path).expanduser())))
        if not self._shards:
            raise SourceError(f"no tar is called {path}")
        said = hashlib.sha256(repr([shard.name for shard in self._shards]).encode()).hexdigest()
        place = self._shards[0].with_name(f"shards-{said[:16]}.index")
        # The end of each sample's members; of each member its shard, start and size, and the end
        # of its name; the names.
        self._ends, self._members, self._names = kept_arrays(
            place, "members", self._shards, lambda: _found(self._shards)
        )

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, number: int) -> Conversation:
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} is not in 0..{len(self) - 1}")
        first = int(self._ends[number - 1]) if number else 0
        of_sample = range(first, int(self._ends[number]))
        members = dict(map(self._member, of_sample))
        if _TEXT not in members:
            shard = next(iter(members.values())).path
            raise SampleError("malformed", f"a sample of {shard} has no .{_TEXT}")
        try:
            value = json.loads(members[_TEXT].read())
        except ValueError as error:
            raise SampleError("malformed", f"{members[_TEXT].name}: {error}") from error
        if not isinstance(value, dict) or "messages" not in value:
            raise SampleError("malformed", f"{members[_TEXT].name} has no messages")
        return from_messages(value["messages"], lambda kind, said: _of(members, kind, said))

    def _member(self, number: int) -> tuple[str, StretchItem]:
        """A member's extension, and where it lies."""
        shard, start, size, end = self._members[number].tolist()
        before = int(self._members[number - 1, 3]) if number else 0
        name = self._names[before:end].tobytes().decode("utf-8", "surrogateescape")
        extension = name.rpartition("/")[2].partition(".")[2]
        return extension, StretchItem(self._shards[shard], start, size, name)

    def fingerprint(self) -> str:
        """Return text that changes when a shard is written."""
        return fingerprint_of(self._shards, {})


def _found(shards: Sequence[Path]) -> list[np.ndarray]:
    """What :class:`TarShards` keeps of its shards."""
    ends, members, names = [np.empty(0, np.int64)], [np.empty((0, 4), np.int64)], bytearray()
    for number, shard in enumerate(shards):
        counts, rows = [], []
        for sample in _samples(shard):
            for name, offset, size in sample:
                names += name.encode("utf-8", "surrogateescape")
                rows.append((number, offset + _HEADER, size, len(names)))
            counts.append(len(sample))
        ends.append(np.cumsum(counts, dtype=np.int64) + sum(map(len, members)))
        members.append(np.array(rows, dtype=np.int64).reshape(-1, 4))
    text = np.frombuffer(bytes(names), dtype=np.uint8)
    return [np.concatenate(ends), np.concatenate(members), text]


def _samples(shard: Path) -> Iterable[list[tuple[str, int, int]]]:
    """The members of each sample of a shard: name, where its header is, size."""
    try:
        from wids.wids_mmtar import MMIndexedTar
    except ImportError as error:
        raise SourceError(
            f"{shard} needs the package webdataset: pip install 'megatron-mimo-colocated[train]'"
        ) from error
    found: dict[str, list[tuple[str, int, int]]] = {}
    try:
        tar = MMIndexedTar(str(shard))
    except (ValueError, IndexError) as error:
        raise SourceError(f"{shard} is no tar: {error}") from error
    for name, offset, size in tar.by_index:
        folder, _, file = name.rpartition("/")
        found.setdefault(f"{folder}/{file.partition('.')[0]}", []).append((name, offset, size))
    tar.close()
    return found.values()


def _of(members: Mapping[str, StretchItem], kind: str, said: Any) -> StretchItem:
    if not isinstance(said, str) or said not in members:
        raise SampleError(
            "malformed", f"{kind} {said!r:.80} is no member; there are {_names(members)}"
        )
    return members[said]


def _names(members: Mapping[str, StretchItem]) -> str:
    return ", ".join(sorted(members))
