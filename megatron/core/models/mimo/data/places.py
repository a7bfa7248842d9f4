# SPDX-License-Identifier: Apache-2.0
"""How many tokens stand for an image or a sound: as many as the model's processor makes of it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron.core.models.mimo.data.conversation import ITEM_KINDS, AnyItem, SampleError
from megatron.core.models.mimo.data.images import Size, size_of
from megatron.core.models.mimo.data.sounds import length_of

_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_SIZES = ((48, 96), (224, 320))  # (height, width); do rows depend on it?


@dataclass(frozen=True)
class Shown:
    """What an image, or a sound, is in the text.

    Attributes:
        rows: tokens that stand for it.
        grid: its frames, rows and columns of patches, where positions count them; else zeros.
    """

    rows: int
    grid: tuple[int, int, int]


class Places(Protocol):
    """Says what items are in the text."""

    @property
    def kind(self) -> str:
        """Of the items: ``"image"`` or ``"audio"``."""
        ...

    @property
    def place(self) -> str:
        """The text that stands for an item, or for one of its rows."""
        ...

    def shown(self, item: AnyItem) -> Shown:
        """Return what an item is in the text.

        Raises:
            SampleError: ``unreadable``; a sound may be ``too_long``.
        """
        ...


def places_of(folder: Path, tokenizer: Any) -> Places | None:
    """Return what a model's folder says of images or sounds; None where it takes text alone.

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
    if hasattr(processor, "audio_token") and not hasattr(processor, "image_token"):
        return SoundPlaces(processor)
    return ProcessorPlaces(processor) if hasattr(processor, "tokenizer") else None


def foreign_tokens(folder: Path, own: str) -> dict[str, int]:
    """Return kind -> token of what a model sees or hears besides its items, by its configuration.

    Args:
        folder: of the model.
        own: kind of its items.
    """
    config = folder / "config.json"
    known = json.loads(config.read_text()) if config.is_file() else {}
    found = {
        kind: known.get(f"{kind}_token_id", known.get(f"{kind}_token_index"))
        for kind in ITEM_KINDS
        if kind != own
    }
    return {kind: token for kind, token in found.items() if token is not None}


class ProcessorPlaces:
    """Asks a whole processor, LLaVA's or one like it, what it makes of a blank image.

    Args:
        processor: of transformers.
    """

    kind = "image"

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

    kind, chat_template = "image", None

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


class SoundPlaces:
    """Asks a whole processor, Qwen2-Audio's or one like it, what it makes of silence.

    Args:
        processor: of transformers.
    """

    kind = "audio"

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self.place: str = processor.audio_token
        extractor = processor.feature_extractor
        self._rate, self._longest = extractor.sampling_rate, extractor.n_samples
        self._step = extractor.hop_length
        self._rows: dict[int, int] = {}

    @property
    def chat_template(self) -> Any:
        """The processor's own, if it has one."""
        return getattr(self._processor, "chat_template", None)

    def shown(self, item: AnyItem) -> Shown:
        """Return what a sound is in the text, by its length.

        Raises:
            SampleError: ``too_long`` for the processor, which would cut it; ``unreadable``, one too
                short for a row among them.
        """
        length = length_of(item, self._rate)
        if length > self._longest:
            has, takes = (count / self._rate for count in (length, self._longest))
            raise SampleError(
                "too_long", f"{item.name} has {has:.3g} s, and its processor takes {takes:.3g} s"
            )
        rows = self.rows(-(-length // self._step))
        if not rows:
            has = length / self._rate
            raise SampleError("unreadable", f"{item.name} has {has:.3g} s, too few for a row")
        return Shown(rows, (0, 0, 0))

    def rows(self, steps: int) -> int:
        """Return the rows of a sound whose spectrum has so many steps."""
        if steps and steps not in self._rows:
            silence = np.zeros(min(steps * self._step, self._longest), dtype=np.float32)
            made = self._processor(
                text=self.place, audio=silence, sampling_rate=self._rate, add_special_tokens=False
            )
            (ids,) = made["input_ids"]
            token = self._processor.tokenizer.convert_tokens_to_ids(self.place)
            self._rows[steps] = list(ids).count(token)
        return self._rows.get(steps, 0)


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
