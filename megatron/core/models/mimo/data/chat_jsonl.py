# SPDX-License-Identifier: Apache-2.0
"""Chat messages, one conversation per line: JSONL, read by number without reading the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron.core.models.mimo.data.conversation import Conversation, SampleError
from megatron.core.models.mimo.data.kept_arrays import JsonValues
from megatron.core.models.mimo.data.messages import files_below, from_messages
from megatron.core.models.mimo.data.sources import fingerprint_of

_BLOCK = 1 << 22


class ChatJsonl:
    """Lines of ``{"messages": [{"role": ..., "content": ...}, ...]}``; empty lines are no samples.

    Where lines begin is found once and kept in ``PATH.index``.

    Args:
        path: of the file.
        media: folder of images and other items; the file's own if None.
    """

    def __init__(self, path: str | Path, media: str | Path | None = None) -> None:
        self._path = Path(path).expanduser()
        self._media = Path(media).expanduser() if media else self._path.parent
        self._find = files_below(self._media)
        self._lines = JsonValues(self._path, "lines", find_lines)

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, number: int) -> Conversation:
        value = self._lines[number]
        if not isinstance(value, dict) or "messages" not in value:
            raise SampleError("malformed", f"sample {number} has no messages")
        return from_messages(value["messages"], self._find)

    def fingerprint(self) -> str:
        """Return text that changes when the file is written."""
        return fingerprint_of([self._path], {"media": self._media})


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
