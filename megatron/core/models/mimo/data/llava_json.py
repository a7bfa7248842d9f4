# SPDX-License-Identifier: Apache-2.0
"""LLaVA's format: one JSON file of conversations, and a folder of images."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron.core.models.mimo.data.conversation import (
    Conversation,
    FileItem,
    Part,
    SampleError,
    Turn,
    text,
)
from megatron.core.models.mimo.data.sources import SourceError, fingerprint_of

_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
_PLACE = re.compile(r"\n?<image>\n?")


class LlavaJson:
    """``[{"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>..."}]}]``.

    ``image`` may be a list; each ``<image>`` stands for the next of them. Line breaks around one
    are left out, as the chat template puts its own.

    Args:
        path: of the JSON file.
        images: the folder; the JSON file's own if None.

    Raises:
        SourceError: the file is no such list.
    """

    def __init__(self, path: str | Path, images: str | Path | None = None) -> None:
        self._path = Path(path).expanduser()
        self._images = Path(images).expanduser() if images else self._path.parent
        try:
            self._samples = json.loads(self._path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise SourceError(f"{self._path} is no JSON: {error}") from error
        if not isinstance(self._samples, list):
            raise SourceError(
                f"{self._path} holds {type(self._samples).__name__}, not a list of conversations"
            )

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
