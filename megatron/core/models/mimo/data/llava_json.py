# SPDX-License-Identifier: Apache-2.0
"""LLaVA's format: one JSON file of conversations, and a folder of images."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron.core.models.mimo.data.conversation import (
    Conversation,
    FileItem,
    Part,
    SampleError,
    Turn,
    text,
)
from megatron.core.models.mimo.data.kept_arrays import JsonValues
from megatron.core.models.mimo.data.sources import SourceError, fingerprint_of

_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
_PLACE = re.compile(r"\n?<image>\n?")
_BLANKS = re.compile(r"[ \t\n\r]*")
_BLOCK = 1 << 22
_LONGEST = 16  # characters of what is wrong only because a block ends within it: \\ud83d\\ude00
_decode = json.JSONDecoder().raw_decode


class LlavaJson:
    """``[{"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>..."}]}]``.

    ``image`` may be a list; each ``<image>`` stands for the next of them. Line breaks around one
    are left out, as the chat template puts its own. Where samples begin is found once and kept in
    ``PATH.index``.

    Args:
        path: of the JSON file.
        images: the folder; the JSON file's own if None.

    Raises:
        SourceError: the file is no such list.
    """

    def __init__(self, path: str | Path, images: str | Path | None = None) -> None:
        self._path = Path(path).expanduser()
        self._images = Path(images).expanduser() if images else self._path.parent
        self._samples = JsonValues(self._path, "elements", find_elements)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, number: int) -> Conversation:
        sample = self._samples[number]
        if not isinstance(sample, Mapping) or not isinstance(sample.get("conversations"), list):
            raise SampleError("malformed", f"sample {number} has no list of conversations")
        images = iter(_named(sample.get("image") or []))
        turns = tuple(self._turn(said, images) for said in sample["conversations"])
        if next(images, None) is not None:
            raise SampleError("malformed", f"sample {number} has more images than <image>")
        return Conversation(turns)

    def fingerprint(self) -> str:
        """Return text that changes when the JSON file is written."""
        return fingerprint_of([self._path], {"images": self._images})

    def _turn(self, said: Any, images: Iterator[str]) -> Turn:
        side = said.get("from") if isinstance(said, Mapping) else None
        if not isinstance(side, str) or not isinstance(said.get("value"), str):
            raise SampleError("malformed", f"a turn needs from and value, got {said!r:.80}")
        role = _ROLES.get(side, side)
        parts: list[Part] = []
        for place, piece in enumerate(_PLACE.split(said["value"])):
            if place:
                image = next(images, None)
                if image is None:
                    raise SampleError("malformed", "a turn has more <image> than there are images")
                parts.append(Part("image", "", FileItem(self._images / image)))
            if piece:
                parts.append(text(piece))
        return Turn(role, tuple(parts))


def _named(image: Any) -> list[str]:
    names = [image] if isinstance(image, str) else image
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise SampleError("malformed", f"image is a name or a list of names, got {image!r:.80}")
    return names


def find_elements(path: Path) -> np.ndarray:
    """Return where the elements of a file's JSON list begin and end, int64 ``(n, 2)``.

    Args:
        path: of the file; it is read once, in blocks.

    Raises:
        SourceError: the file is no such list.
    """
    with path.open("rb") as file:
        spans = np.fromiter((place for span in _elements(path, file) for place in span), np.int64)
    return spans.reshape(-1, 2)


def _elements(path: Path, file: BinaryIO) -> Iterator[tuple[int, int]]:
    """Where each element begins and ends; text has a character for each byte from ``base`` on."""
    text, base, at, opening = "", 0, 0, "["
    while True:
        try:
            found = _next(text, at, opening)
        except json.JSONDecodeError as error:
            cut_off = error.msg.startswith("Unterminated") or error.pos + _LONGEST > len(text)
            # As much again, so that no element is read more than twice its length.
            more = file.read(max(_BLOCK, len(text))).decode("latin-1") if cut_off else ""
            if not more:
                raise _no_list(path, f"{error.msg}, byte {base + error.pos}") from error
            text, base, at = text[at:] + more, base + at, 0
            continue
        if found is None:
            break
        start, stop = found
        yield base + start, base + stop
        at, opening = stop, ","
    rest = text[text.index("]", at) + 1 :]
    while rest:
        if _after_blanks(rest, 0) < len(rest):
            raise _no_list(path, "more follows where its list ends")
        rest = file.read(_BLOCK).decode("latin-1")


def _no_list(path: Path, why: str) -> SourceError:
    return SourceError(f"{path} is no JSON list of conversations: {why}")


def _next(text: str, at: int, opening: str) -> tuple[int, int] | None:
    """Where the next element begins and ends; None at the end of the list."""
    at = _after_blanks(text, at)
    if opening == "," and text.startswith("]", at):
        return None
    if not text.startswith(opening, at):
        raise json.JSONDecodeError(f"Expecting {opening!r}", text, at)
    at = _after_blanks(text, at + 1)
    if opening == "[" and text.startswith("]", at):
        return None
    _, stop = _decode(text, at)
    if stop == len(text):  # of a number more may follow
        raise json.JSONDecodeError("Expecting ',' or ']'", text, stop)
    return at, stop


def _after_blanks(text: str, at: int) -> int:
    found = _BLANKS.match(text, at)
    assert found is not None
    return found.end()
