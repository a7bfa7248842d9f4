# SPDX-License-Identifier: Apache-2.0
"""WebDataset tar shards, read by number: headers once, contents where they lie."""

from __future__ import annotations

import glob
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron.core.models.mimo.data.conversation import (
    Conversation,
    SampleError,
    StretchItem,
)
from megatron.core.models.mimo.data.messages import from_messages
from megatron.core.models.mimo.data.sources import SourceError, fingerprint_of

_HEADER = 512
_TEXT = "json"


class TarShards:
    """Samples of members ``KEY.json``, with messages, and ``KEY.EXTENSION``, their items.

    A part of an image names its member by the extension, ``{"type": "image", "image": "0.png"}``.

    Args:
        path: a tar, or a pattern of several, such as ``data/train-*.tar``.

    Raises:
        SourceError: nothing is there, or the package is missing.
    """

    def __init__(self, path: str | Path) -> None:
        self._shards = sorted(Path(name) for name in glob.glob(str(Path(path).expanduser())))
        if not self._shards:
            raise SourceError(f"no tar is called {path}")
        self._samples = [_samples(shard) for shard in self._shards]
        self._ends = np.cumsum([len(samples) for samples in self._samples])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, number: int) -> Conversation:
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} is not in 0..{len(self) - 1}")
        shard = int(np.searchsorted(self._ends, number, side="right"))
        before = int(self._ends[shard - 1]) if shard else 0
        members = self._samples[shard][number - before]
        if _TEXT not in members:
            raise SampleError("malformed", f"a sample of {self._shards[shard]} has no .{_TEXT}")
        try:
            value = json.loads(members[_TEXT].read())
        except ValueError as error:
            raise SampleError("malformed", f"{members[_TEXT].name}: {error}") from error
        if not isinstance(value, dict) or "messages" not in value:
            raise SampleError("malformed", f"{members[_TEXT].name} has no messages")
        return from_messages(value["messages"], lambda kind, said: _member(members, kind, said))

    def fingerprint(self) -> str:
        """Return text that changes when a shard is written."""
        return fingerprint_of(self._shards, {})


def _samples(shard: Path) -> list[dict[str, StretchItem]]:
    """Extension -> member, of each sample of a shard."""
    try:
        from wids.wids_mmtar import MMIndexedTar
    except ImportError as error:
        raise SourceError(
            f"{shard} needs the package webdataset: pip install 'megatron-mimo-colocated[train]'"
        ) from error
    found: dict[str, dict[str, StretchItem]] = {}
    try:
        tar = MMIndexedTar(str(shard))
    except (ValueError, IndexError) as error:
        raise SourceError(f"{shard} is no tar: {error}") from error
    for name, offset, size in tar.by_index:
        folder, _, file = name.rpartition("/")
        key, _, extension = file.partition(".")
        members = found.setdefault(f"{folder}/{key}", {})
        members[extension] = StretchItem(shard, offset + _HEADER, size, name)
    tar.close()
    return list(found.values())


def _member(members: Mapping[str, StretchItem], kind: str, said: Any) -> StretchItem:
    if not isinstance(said, str) or said not in members:
        has = ", ".join(sorted(members))
        raise SampleError("malformed", f"{kind} {said!r:.80} is no member; there are {has}")
    return members[said]
