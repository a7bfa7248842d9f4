# SPDX-License-Identifier: Apache-2.0
"""WebDataset tar shards, read by number: headers once, contents where they lie."""

from __future__ import annotations

import glob
import hashlib
import json
from array import array
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


class Members:
    """Members of the samples of tar shards, by the number of the sample.

    Args:
        shards: the tars.
        found: the end of each sample's members, int64 ``(n,)``; of each member its shard, where
            its content starts, its size, and the end of its name, int64 ``(m, 4)``; all names,
            uint8.
    """

    def __init__(self, shards: Sequence[Path], found: Sequence[np.ndarray]) -> None:
        self._shards = shards
        self._ends, self._members, self._names = found

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, number: int) -> dict[str, StretchItem]:
        """Return extension -> member."""
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} is not in 0..{len(self) - 1}")
        first = int(self._ends[number - 1]) if number else 0
        return dict(map(self._member, range(first, int(self._ends[number]))))

    def _member(self, number: int) -> tuple[str, StretchItem]:
        shard, start, size, end = self._members[number].tolist()
        before = int(self._members[number - 1, 3]) if number else 0
        name = self._names[before:end].tobytes().decode("utf-8", "surrogateescape")
        extension = name.rpartition("/")[2].partition(".")[2]
        return extension, StretchItem(self._shards[shard], start, size, name)


class Table:
    """Collects what :class:`Members` is made of, sample by sample."""

    def __init__(self) -> None:
        self._ends, self._members, self._names = array("q"), array("q"), bytearray()

    def add(self, members: Iterable[tuple[int, int, int, str]]) -> None:
        """Take a sample's members: shard, start of the content, size, name."""
        for shard, start, size, name in members:
            self._names += name.encode("utf-8", "surrogateescape")
            self._members.extend((shard, start, size, len(self._names)))
        self._ends.append(len(self._members) // 4)

    def arrays(self) -> list[np.ndarray]:
        """Return them."""
        numbers = [np.array(each, dtype=np.int64) for each in (self._ends, self._members)]
        return [numbers[0], numbers[1].reshape(-1, 4), np.frombuffer(self._names, dtype=np.uint8)]


def conversation_of(members: Mapping[str, StretchItem]) -> Conversation:
    """Return the conversation of a sample whose ``.json`` has messages.

    Args:
        members: extension -> member.

    Raises:
        SampleError: ``malformed``.
    """
    value = json_of(members, _TEXT)
    if not isinstance(value, dict) or "messages" not in value:
        raise SampleError("malformed", f"{members[_TEXT].name} has no messages")
    return from_messages(value["messages"], lambda kind, said: _of(members, kind, said))


def json_of(members: Mapping[str, StretchItem], extension: str) -> Any:
    """Return what a member holds.

    Args:
        members: extension -> member.
        extension: of the member.

    Raises:
        SampleError: ``malformed``: there is no such member, or it is no JSON.
    """
    if extension not in members:
        shard = next(iter(members.values())).path
        raise SampleError("malformed", f"a sample of {shard} has no .{extension}")
    try:
        return json.loads(members[extension].read())
    except ValueError as error:
        raise SampleError("malformed", f"{members[extension].name}: {error}") from error


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
        found = kept_arrays(place, "members", self._shards, lambda: _found(self._shards))
        self._members = Members(self._shards, found)

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, number: int) -> Conversation:
        return conversation_of(self._members[number])

    def fingerprint(self) -> str:
        """Return text that changes when a shard is written."""
        return fingerprint_of(self._shards, {})


def _found(shards: Sequence[Path]) -> list[np.ndarray]:
    """What :class:`Members` is made of."""
    table = Table()
    for number, shard in enumerate(shards):
        for sample in _samples(shard):
            table.add((number, offset + _HEADER, size, name) for name, offset, size in sample)
    return table.arrays()


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
