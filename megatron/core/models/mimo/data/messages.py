# SPDX-License-Identifier: Apache-2.0
"""Chat messages, as JSON has them, into a conversation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron.core.models.mimo.data.conversation import (
    ITEM_KINDS,
    AnyItem,
    Conversation,
    FileItem,
    Part,
    SampleError,
    Turn,
    text,
)

Find = Callable[[str, Any], AnyItem]
"""From a part's kind and what it says of its content to the item."""


def from_messages(messages: Any, find: Find) -> Conversation:
    """Return the conversation of ``[{"role": ..., "content": ...}, ...]``.

    A content is text or a list of parts: ``{"type": "text", "text": ...}`` or
    ``{"type": "image", "image": ...}``, the same for videos and sounds. A video that is the list
    of its frames is so many images.

    Args:
        messages: as JSON has them.
        find: finds the item of a part.

    Raises:
        SampleError: ``malformed``.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise SampleError("malformed", f"messages is no list but {type(messages).__name__}")
    return Conversation(tuple(_turn(message, find) for message in messages))


def _turn(message: Any, find: Find) -> Turn:
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        raise SampleError("malformed", f"a message needs role and content, got {message!r:.80}")
    content = message["content"]
    if isinstance(content, str):
        return Turn(str(message["role"]), (text(content),))
    if not isinstance(content, Sequence):
        raise SampleError("malformed", f"content is text or a list of parts, got {content!r:.80}")
    parts = (each for part in content for each in _frames_of(part))
    return Turn(str(message["role"]), tuple(_part(part, find) for part in parts))


def _frames_of(part: Any) -> Iterator[Any]:
    """The images of a video that is a list of frames; any other part as it is."""
    is_video = isinstance(part, Mapping) and part.get("type") == "video"
    frames = _content_of("video", part) if is_video else None
    if isinstance(frames, Sequence) and not isinstance(frames, str):
        yield from ({"type": "image", "image": frame} for frame in frames)
    else:
        yield part


def _part(part: Any, find: Find) -> Part:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return text(part["text"])
    if kind in ITEM_KINDS:
        return Part(kind, "", find(kind, _content_of(kind, part)))
    raise SampleError(
        "malformed",
        f"a part is text, or {', '.join(ITEM_KINDS)} with its content, got {part!r:.80}",
    )


def _content_of(kind: str, part: Mapping[str, Any]) -> Any:
    for name in (kind, "path", "url", f"{kind}_url"):
        if part.get(name) is not None:
            return part[name]
    return None


def files_below(folder: Path) -> Find:
    """Return a function that finds items as files; relative paths start in ``folder``."""

    def find(kind: str, said: Any) -> FileItem:
        if not isinstance(said, str) or "://" in said.removeprefix("file://"):
            raise SampleError("malformed", f"{kind} names no file but {said!r:.80}")
        return FileItem(folder / said.removeprefix("file://"))

    return find
