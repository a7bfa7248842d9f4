# SPDX-License-Identifier: Apache-2.0
"""Tokens and rows of every sample of a source, in files that are mapped.

They are made once and serve every rank: planning a batch reads lengths, and what a rank computes on
it reads from the same pages of memory as its peers. Which samples are skipped, and why, is
decided here, so that the order of the others is known before the first step.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron.core.models.mimo.comm.plan.token_runs import expand
from megatron.core.models.mimo.data.batches import ItemRows
from megatron.core.models.mimo.data.conversation import (
    REASONS,
    Conversation,
    SampleError,
)
from megatron.core.models.mimo.data.encoding import Encoded
from megatron.core.models.mimo.data.images import look_at
from megatron.core.models.mimo.data.sources import Source, SourceError

_META = "prepared.json"
_ARRAYS = ("ids", "learned", "ends", "rows", "grids", "row_ends", "reasons")
_PIECE = ("ids", "learned", "lengths", "rows", "grids", "items", "reasons")
_ENDS = {"lengths": "ends", "items": "row_ends"}
_KEPT, _UNREADABLE = REASONS.index("kept"), REASONS.index("unreadable")


@dataclass(frozen=True, eq=False)
class Piece:
    """Some consecutive samples.

    Attributes:
        ids: int32, learned: bool; both ``(tokens,)``.
        lengths: tokens of each sample, int64 ``(n,)``; 0 of a skipped one.
        rows: of each item, int32 ``(items,)``.
        grids: of each item, int32 ``(items, 3)``.
        items: of each sample, int64 ``(n,)``.
        reasons: of each sample, uint8 ``(n,)``, numbers of :data:`REASONS`.
        first: why the first skipped one is skipped, in words; empty if none is.
    """

    ids: np.ndarray
    learned: np.ndarray
    lengths: np.ndarray
    rows: np.ndarray
    grids: np.ndarray
    items: np.ndarray
    reasons: np.ndarray
    first: str


def encode_piece(
    source: Source,
    encode: Callable[[Conversation], Encoded],
    numbers: Iterable[int],
    look: bool,
) -> Piece:
    """Encode some samples of a source.

    Args:
        source: of the samples.
        encode: makes a sample into tokens.
        numbers: of the samples.
        look: whether every image's file is looked at: one that is none is ``unreadable`` now, and
            not in the midst of a run.
    """
    found: list[Encoded] = []
    reasons: list[int] = []
    first, nothing = "", np.empty(0, dtype=np.int32)
    for number in numbers:
        try:
            conversation = source[number]
            found.append(encode(conversation))
            if look:
                for item in conversation.items():
                    look_at(item)
            reasons.append(_KEPT)
        except SampleError as error:
            del found[len(reasons) :]
            found.append(Encoded(nothing, nothing.astype(bool), nothing, nothing.reshape(0, 3)))
            reasons.append(REASONS.index(error.reason))
            first = first or f"sample {number} is {error.reason}: {error}"
    return Piece(
        ids=np.concatenate([nothing, *(each.input_ids for each in found)]),
        learned=np.concatenate([nothing.astype(bool), *(each.learned for each in found)]),
        lengths=np.array([len(each.input_ids) for each in found], dtype=np.int64),
        rows=np.concatenate([nothing, *(each.rows for each in found)]),
        grids=np.concatenate([nothing.reshape(0, 3), *(each.grids for each in found)]),
        items=np.array([len(each.rows) for each in found], dtype=np.int64),
        reasons=np.array(reasons, dtype=np.uint8),
        first=first,
    )


def keep(piece: Piece, folder: Path) -> None:
    """Write a piece for :func:`write`, which may run in another process.

    Args:
        piece: of a source.
        folder: to write; what is there is replaced.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in _PIECE:
        np.save(folder / f"{name}.npy", getattr(piece, name))
    (folder / _META).write_text(json.dumps({"first_skipped": piece.first}))


def write(folder: Path, pieces: Sequence[Path], key: str) -> None:
    """Write what :class:`Prepared` opens, whole or not at all; no piece is in memory as a whole.

    Args:
        folder: to write; what is there is replaced.
        pieces: folders of :func:`keep`, of all samples in order.
        key: says what the samples and their encoding were.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name in _PIECE:
        parts = [_opened(piece / f"{name}.npy") for piece in pieces]
        if name in _ENDS:
            np.save(temporary / f"{_ENDS[name]}.npy", np.cumsum(np.concatenate(parts)))
        else:
            _join(temporary / f"{name}.npy", parts)
    said = [json.loads((piece / _META).read_text())["first_skipped"] for piece in pieces]
    first = next((words for words in said if words), "")
    (temporary / _META).write_text(json.dumps({"key": key, "first_skipped": first}))
    shutil.rmtree(folder, ignore_errors=True)
    temporary.replace(folder)


def _join(path: Path, parts: Sequence[np.ndarray]) -> None:
    shape = (sum(map(len, parts)), *parts[0].shape[1:])
    if not np.prod(shape):
        np.save(path, np.empty(shape, dtype=parts[0].dtype))
        return
    whole = np.lib.format.open_memmap(path, "w+", dtype=parts[0].dtype, shape=shape)
    at = 0
    for part in parts:
        whole[at : at + len(part)] = part
        at += len(part)
    whole.flush()


def known_key(folder: Path) -> str | None:
    """Return the key of what is prepared in a folder; None if nothing is."""
    try:
        return json.loads((folder / _META).read_text())["key"]
    except (OSError, ValueError, KeyError):
        return None


def is_current(
    folder: Path,
    key: str,
    source: Source,
    encode: Callable[[Conversation], Encoded],
    look: bool,
) -> bool:
    """Return whether what is prepared is of a key, and what was unreadable then still is.

    Images are no part of a key; those that could not be read may have been fetched since.

    Args:
        folder: where it is.
        key: that it should have.
        source: of the samples.
        encode: makes a sample into tokens.
        look: whether every image's file is looked at.
    """
    if known_key(folder) != key:
        return False
    reasons = np.asarray(_opened(folder / "reasons.npy"))
    numbers = np.flatnonzero(reasons == _UNREADABLE).tolist()
    return bool((encode_piece(source, encode, numbers, look).reasons == _UNREADABLE).all())


class Prepared:
    """The samples of a source that are kept, numbered from 0; see :func:`write`.

    Args:
        folder: where they are.

    Attributes:
        numbers: in the source, of each kept sample, int64 ``(n,)``.
        skipped: reason -> how many samples are skipped for it.
        first_skipped: why the first is, in words; empty if none is.

    Raises:
        SourceError: no sample is kept.
    """

    def __init__(self, folder: Path) -> None:
        self._arrays: dict[str, np.ndarray] = {
            name: _opened(folder / f"{name}.npy") for name in _ARRAYS
        }
        meta: dict[str, Any] = json.loads((folder / _META).read_text())
        self.first_skipped = meta["first_skipped"]
        reasons = np.asarray(self._arrays["reasons"])
        self.numbers = np.flatnonzero(reasons == _KEPT)
        self.skipped = dict(Counter(REASONS[n] for n in reasons[reasons != _KEPT].tolist()))
        if not len(self.numbers):
            raise SourceError(
                f"no sample of {len(reasons)} is kept: {self.skipped}; {self.first_skipped}"
            )

    def __len__(self) -> int:
        return len(self.numbers)

    def lengths(self, samples: np.ndarray) -> np.ndarray:
        """Return the tokens of samples, int64 ``(n,)``."""
        starts, stops = self._bounds("ends", self.numbers[samples])
        return stops - starts

    def items(self, samples: np.ndarray) -> ItemRows:
        """Return the rows of samples' items."""
        starts, stops = self._bounds("row_ends", self.numbers[samples])
        counts = stops - starts
        return ItemRows(self._arrays["rows"][expand(np.stack([starts, counts], axis=1))], counts)

    def grids(self, sample: int) -> np.ndarray:
        """Return the grids of a sample's items, int32 ``(items, 3)``."""
        start, stop = self._bounds("row_ends", self.numbers[sample])
        return self._arrays["grids"][start:stop]

    def tokens(self, sample: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a sample's tokens and which of them are learned: int32, bool ``(n,)``."""
        start, stop = self._bounds("ends", self.numbers[sample])
        return self._arrays["ids"][start:stop], self._arrays["learned"][start:stop]

    def _bounds(self, name: str, number: Any) -> tuple[Any, Any]:
        ends = self._arrays[name]
        stops = ends[number]
        return np.where(np.asarray(number) > 0, ends[np.asarray(number) - 1], 0), stops


def _opened(path: Path) -> np.ndarray:
    """An array, mapped; one without elements cannot be."""
    with path.open("rb") as file:
        version = np.lib.format.read_magic(file)
        shape = getattr(np.lib.format, f"read_array_header_{version[0]}_0")(file)[0]
    return np.load(path, mmap_mode="r" if np.prod(shape) else None)
