# SPDX-License-Identifier: Apache-2.0
"""A sample as people have it: turns of text and of items, which are opened when they are read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

ITEM_KINDS = ("image", "video", "audio")
"""Kinds of parts that are no text."""
ROLES = ("system", "user", "assistant")
"""Who may speak."""
REASONS = ("kept", "malformed", "unreadable", "too_long", "no_supervision")
"""What becomes of a sample: ``kept``, or why it is skipped; files hold its number."""


class SampleError(ValueError):
    """A sample cannot be used.

    Args:
        reason: one of :data:`REASONS`.
        message: what is wrong with it.

    Attributes:
        reason: as given.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Item(Protocol):
    """Content outside of the text; it can be sent to other processes."""

    @property
    def name(self) -> str:
        """What it is called in errors."""
        ...

    def read(self) -> bytes:
        """Return the bytes of the file, still encoded.

        Raises:
            SampleError: ``unreadable``.
        """
        ...


@dataclass(frozen=True)
class FileItem:
    """A file.

    Attributes:
        path: of it.
    """

    path: Path

    @property
    def name(self) -> str:
        """Its path."""
        return str(self.path)

    def read(self) -> bytes:
        """Return the file's bytes.

        Raises:
            SampleError: ``unreadable``.
        """
        return _bytes_of(self.path, self.name, 0, -1)


@dataclass(frozen=True)
class StretchItem:
    """A stretch of a file, such as a member of a tar.

    Attributes:
        path: of the file.
        start, size: of the stretch, in bytes.
        member: its name within the file.
    """

    path: Path
    start: int
    size: int
    member: str

    @property
    def name(self) -> str:
        """File and member."""
        return f"{self.member} of {self.path}"

    def read(self) -> bytes:
        """Return the stretch.

        Raises:
            SampleError: ``unreadable``.
        """
        found = _bytes_of(self.path, self.name, self.start, self.size)
        if len(found) != self.size:
            raise SampleError(
                "unreadable", f"{self.name} has {len(found)} of its {self.size} bytes"
            )
        return found


@dataclass(frozen=True)
class BytesItem:
    """Bytes that are in memory already, out of a table.

    Attributes:
        content: the bytes.
        name: what it is called in errors.
    """

    content: bytes
    name: str

    def read(self) -> bytes:
        """Return them."""
        return self.content


AnyItem: TypeAlias = FileItem | StretchItem | BytesItem


def _bytes_of(path: Path, name: str, start: int, size: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(start)
            return file.read(size)
    except (OSError, ValueError) as error:  # the latter for names that no file can have
        reason = getattr(error, "strerror", None) or str(error)
        raise SampleError("unreadable", f"{name} cannot be read: {reason}") from error


@dataclass(frozen=True)
class Part:
    """Text, or an item.

    Attributes:
        kind: ``"text"`` or one of :data:`ITEM_KINDS`.
        text: of a text, else empty.
        item: of what is no text, else None.

    Raises:
        SampleError: ``malformed``: another kind, or text and item do not go with it.
    """

    kind: str
    text: str
    item: AnyItem | None

    def __post_init__(self) -> None:
        if self.kind not in ("text", *ITEM_KINDS):
            known = ", ".join(("text", *ITEM_KINDS))
            raise SampleError("malformed", f"a part of kind {self.kind!r}; the kinds are {known}")
        if (self.kind == "text") is (self.item is not None) or (self.item and self.text):
            raise SampleError("malformed", f"a part of kind {self.kind} has text or an item, alone")


def text(content: str) -> Part:
    """Return a part of text."""
    return Part("text", content, None)


@dataclass(frozen=True)
class Turn:
    """What one side says.

    Attributes:
        role: one of :data:`ROLES`.
        parts: in order.

    Raises:
        SampleError: ``malformed``: another role.
    """

    role: str
    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            known = ", ".join(ROLES)
            raise SampleError("malformed", f"role {self.role!r} is not known; roles are {known}")


@dataclass(frozen=True)
class Conversation:
    """A sample.

    Attributes:
        turns: in order; at least one.

    Raises:
        SampleError: ``malformed``: there is no turn.
    """

    turns: tuple[Turn, ...]

    def __post_init__(self) -> None:
        if not self.turns:
            raise SampleError("malformed", "a conversation has no turn")

    def items(self) -> list[AnyItem]:
        """Return the items in the order of the text."""
        return [part.item for part in self.item_parts() if part.item is not None]

    def item_parts(self) -> Iterator[Part]:
        """Yield the parts that are no text, in order."""
        for turn in self.turns:
            yield from (part for part in turn.parts if part.item is not None)
