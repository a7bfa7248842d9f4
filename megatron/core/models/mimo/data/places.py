# SPDX-License-Identifier: Apache-2.0
"""How many tokens stand for an image: as many as the model's own processor makes of its size."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron.core.models.mimo.data.conversation import AnyItem, SampleError
from megatron.core.models.mimo.data.images import Size, size_of

_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_SIZES = ((48, 96), (224, 320))  # (height, width); do rows depend on it?


@dataclass(frozen=True)
class Shown:
    """What an image is in the text.

    Attributes:
        rows: tokens that stand for it.
        grid: its frames, rows and columns of patches, where positions count them; else zeros.
    """

    rows: int
    grid: tuple[int, int, int]


class Places(Protocol):
    """Says what images are in the text."""

    @property
    def place(self) -> str:
        """The text that stands for an image, or for one of its rows."""
        ...

    def shown(self, item: AnyItem) -> Shown:
        """Return what an image is in the text.

        Raises:
            SampleError: ``unreadable``.
        """
        ...


def places_of(folder: Path, tokenizer: Any) -> Places | None:
    """Return what a model's folder says of images; None where it sees nothing.

    Args:
        folder: of the model.
        tokenizer: of it.
    """
    if not any((folder / name).is_file() for name in _PROCESSORS):
        return None
    config = folder / "config.json"
    known = json.loads(config.read_text()) if config.is_file() else {}
    merge = known.get("vision_config", {}).get("spatial_merge_size")
    if merge is not None:
        from transformers import AutoImageProcessor

        place = tokenizer.convert_ids_to_tokens(known["image_token_id"])
        return GridPlaces(AutoImageProcessor.from_pretrained(folder), place, merge)
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    return ProcessorPlaces(processor) if hasattr(processor, "tokenizer") else None


class ProcessorPlaces:
    """Asks a whole processor, LLaVA's or one like it, what it makes of a blank image.

    Args:
        processor: of transformers.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self.place: str = processor.image_token
        self._rows: dict[Size, int] = {}
        self.any_size = len({self.rows(size) for size in _SIZES}) == 1

    @property
    def chat_template(self) -> Any:
        """The processor's own, if it has one."""
        return getattr(self._processor, "chat_template", None)

    def shown(self, item: AnyItem) -> Shown:
        """Return what an image is in the text; its file is looked at only if that may differ.

        Raises:
            SampleError: ``unreadable``.
        """
        if self.any_size:
            return Shown(self.rows(_SIZES[0]), (0, 0, 0))
        size = size_of(item)
        with _of_its_size(item, size):
            return Shown(self.rows(size), (0, 0, 0))

    def rows(self, size: Size) -> int:
        """Return the rows of an image of ``(height, width)``."""
        if size not in self._rows:
            made = self._processor(text=self.place, images=_blank(size), add_special_tokens=False)
            (ids,) = made["input_ids"]
            token = self._processor.tokenizer.convert_tokens_to_ids(self.place)
            self._rows[size] = list(ids).count(token)
        return self._rows[size]


class GridPlaces:
    """Asks an image processor that keeps the shape of images, such as Qwen2-VL's.

    Args:
        processor: its image processor.
        place: the text that stands for one row of an image.
        merge: rows and columns of patches that become one.
    """

    chat_template = None

    def __init__(self, processor: Any, place: str, merge: int) -> None:
        self._processor, self.place, self._merge = processor, place, merge
        self._shown: dict[Size, Shown] = {}

    def shown(self, item: AnyItem) -> Shown:
        """Return what an image is in the text, by its size.

        Raises:
            SampleError: ``unreadable``.
        """
        size = size_of(item)
        if size not in self._shown:
            with _of_its_size(item, size):
                made = self._processor(images=[_blank(size)], return_tensors="np")
            frames, high, wide = (int(count) for count in made["image_grid_thw"][0])
            rows = frames * high * wide // self._merge**2
            self._shown[size] = Shown(rows, (frames, high, wide))
        return self._shown[size]


@contextlib.contextmanager
def _of_its_size(item: AnyItem, size: Size) -> Iterator[None]:
    """Take a processor that refuses images of a size for one that says the image is unreadable."""
    try:
        yield
    except ValueError as error:
        raise SampleError(
            "unreadable",
            f"{item.name} has {size[0]} x {size[1]} pixels, which its processor refuses: {error}",
        ) from error


def _blank(size: Size) -> Any:
    from PIL import Image

    return Image.new("RGB", (size[1], size[0]))
