# SPDX-License-Identifier: Apache-2.0
"""Tables of Hugging Face ``datasets``: a folder that ``save_to_disk`` left, or parquet files."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron.core.models.mimo.data.conversation import (
    AnyItem,
    BytesItem,
    Conversation,
    FileItem,
    SampleError,
)
from megatron.core.models.mimo.data.messages import from_messages
from megatron.core.models.mimo.data.sources import SourceError, fingerprint_of


class Tables:
    """A column of chat messages, and one of the images that they show, in order.

    Args:
        path: folder of ``save_to_disk``, a parquet file, or a pattern of some.
        messages: column of the messages; parts of images say no content.
        images: column of lists of images, each ``{"bytes": ..., "path": ...}``; it may be absent.

    Raises:
        SourceError: nothing is there, the package is missing, or there is no such column.
    """

    def __init__(
        self, path: str | Path, messages: str = "messages", images: str = "images"
    ) -> None:
        self._path = Path(path).expanduser()
        self._messages, self._images = messages, images
        self._files, self._table = _opened(self._path)
        if messages not in self._table.column_names:
            has = ", ".join(self._table.column_names)
            raise SourceError(f"{path} has no column {messages!r}; it has {has}")

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, number: int) -> Conversation:
        row = self._table[number]
        shown = row.get(self._images) or []
        images = _items(number, shown if isinstance(shown, list) else [shown])
        made = from_messages(row[self._messages], lambda kind, said: _next(images, kind, said))
        if next(images, None) is not None:
            raise SampleError("malformed", f"row {number} has more images than its messages show")
        return made

    def fingerprint(self) -> str:
        """Return text that changes when a file is written."""
        return fingerprint_of(self._files, {"messages": self._messages, "images": self._images})


def _opened(path: Path) -> tuple[list[Path], Any]:
    try:
        import datasets
    except ImportError as error:
        raise SourceError(
            f"{path} needs the package datasets: pip install 'megatron-mimo-colocated[train]'"
        ) from error
    if (path / "state.json").is_file():
        table: Any = datasets.load_from_disk(str(path))
        files = sorted(path.glob("*.arrow"))
    else:
        files = sorted(Path(name) for name in glob.glob(str(path)) if name.endswith(".parquet"))
        if not files:
            raise SourceError(
                f"{path} is neither a folder of save_to_disk, with state.json, nor parquet files"
            )
        table = datasets.Dataset.from_parquet([str(file) for file in files])
    return files, _undecoded(datasets, table)


def _undecoded(datasets: Any, table: Any) -> Any:
    """The table with images as their bytes."""
    for name, feature in table.features.items():
        single = isinstance(feature, datasets.Image)
        inner = getattr(feature, "feature", None)
        if single or isinstance(inner, datasets.Image):
            plain = datasets.Image(decode=False)
            table = table.cast_column(name, plain if single else datasets.List(plain))
    return table


def _items(number: int, shown: list[Any]) -> Iterator[AnyItem]:
    for place, image in enumerate(shown):
        if isinstance(image, dict) and image.get("bytes"):
            yield BytesItem(image["bytes"], f"image {place} of row {number}")
        elif isinstance(image, dict) and image.get("path"):
            yield FileItem(Path(image["path"]))
        else:
            raise SampleError("malformed", f"image {place} of row {number} has no bytes, no path")


def _next(images: Iterator[AnyItem], kind: str, said: Any) -> AnyItem:
    if kind != "image" or said is not None:
        raise SampleError("malformed", f"a table shows its images column, got {kind} {said!r:.80}")
    found = next(images, None)
    if found is None:
        raise SampleError("malformed", "messages show more images than the row has")
    return found
