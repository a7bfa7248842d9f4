# SPDX-License-Identifier: Apache-2.0
"""Chat messages, one conversation per line: JSONL, read by number without reading the file."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path

import numpy as np

from megatron.core.models.mimo.data.conversation import Conversation, SampleError
from megatron.core.models.mimo.data.messages import files_below, from_messages
from megatron.core.models.mimo.data.sources import fingerprint_of

_BLOCK = 1 << 22
_SETTLED_NS = 2_000_000_000  # a file written later than this before now may still be written


class ChatJsonl:
    """Lines of ``{"messages": [{"role": ..., "content": ...}, ...]}``; empty lines are no samples.

    Where lines begin is found once and kept in ``PATH.offsets.npy``, if that can be written; what
    is kept is used only for the file that it was made of.

    Args:
        path: of the file.
        media: folder of images and other items; the file's own if None.
    """

    def __init__(self, path: str | Path, media: str | Path | None = None) -> None:
        self._path = Path(path).expanduser()
        self._media = Path(media).expanduser() if media else self._path.parent
        self._find = files_below(self._media)
        # Starts of the lines and the end of the last, int64 (n + 1,) in pairs: (start, stop).
        self._lines = _known_lines(self._path)

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, number: int) -> Conversation:
        start, stop = self._lines[number].tolist()
        with self._path.open("rb") as file:
            file.seek(start)
            line = file.read(stop - start)
        try:
            value = json.loads(line)
        except ValueError as error:
            raise SampleError("malformed", f"line at byte {start}: {error}") from error
        if not isinstance(value, dict) or "messages" not in value:
            raise SampleError("malformed", f"line at byte {start} has no messages")
        return from_messages(value["messages"], self._find)

    def fingerprint(self) -> str:
        """Return text that changes when the file is written."""
        return fingerprint_of([self._path], {"media": self._media})


def _known_lines(path: Path) -> np.ndarray:
    """Where lines begin and end, int64 ``(n, 2)``: from the file beside, or found and put there."""
    beside, key = path.with_name(path.name + ".offsets.npy"), _key(path)
    with contextlib.suppress(OSError, ValueError, EOFError):
        kept = np.load(beside, mmap_mode="r", allow_pickle=False)
        if kept.ndim == 2 and kept.shape[1:] == (2,) and (kept[:2] == key).all():
            return kept[2:]
    lines = find_lines(path)
    if _key(path).tolist() == key.tolist() and time.time_ns() - key[1].max() > _SETTLED_NS:
        _keep(beside, np.concatenate([key, lines]))
    return lines


def _key(path: Path) -> np.ndarray:
    """What tells the file from what it was before: int64 ``(2, 2)``."""
    known = path.stat()
    return np.array([[known.st_size, known.st_ino], [known.st_mtime_ns, known.st_ctime_ns]])


def _keep(beside: Path, rows: np.ndarray) -> None:
    """Write the file whole or not at all; where it cannot be written it is found again."""
    temporary = beside.with_name(f".{beside.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            np.save(file, rows)
        temporary.replace(beside)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()


def find_lines(path: Path) -> np.ndarray:
    """Return where the lines that are not blank begin and end, int64 ``(n, 2)``.

    Args:
        path: of the file; it is read once, in blocks.
    """
    ends: list[np.ndarray] = []
    at, last = 0, b"\n"
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            ends.append(np.flatnonzero(np.frombuffer(block, dtype=np.uint8) == ord("\n")) + at)
            at, last = at + len(block), block[-1:]
    stops = np.concatenate([*ends, *([] if last == b"\n" else [np.array([at])])] or [[]])
    stops = stops.astype(np.int64)
    starts = np.concatenate([[0], stops[:-1] + 1]).astype(np.int64)[: len(stops)]
    lines = np.stack([starts, stops], axis=1)
    return lines[_not_blank(path, lines)]


def _not_blank(path: Path, lines: np.ndarray) -> np.ndarray:
    kept = lines[:, 1] > lines[:, 0]
    short = np.flatnonzero(kept & (lines[:, 1] - lines[:, 0] < 8))  # no conversation is so short
    with path.open("rb") as file:
        for number in short.tolist():
            file.seek(lines[number, 0])
            kept[number] = bool(file.read(int(lines[number, 1] - lines[number, 0])).strip())
    return kept
