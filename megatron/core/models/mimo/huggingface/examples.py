# SPDX-License-Identifier: Apache-2.0
"""Samples to compare a model with transformers on: from the folder's processor, or made up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.core.models.mimo.huggingface.composites import Composite, EncoderPart
from megatron.core.models.mimo.huggingface.family import UnsupportedModelError

_WORDS = "Compare what is here with what you know, and name the first difference."
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class Sample:
    """What a processor makes of one prompt.

    Attributes:
        input_ids: ``(n,)``.
        inputs: name -> the encoder's inputs of its items, along dim 0.
    """

    input_ids: Tensor
    inputs: Mapping[str, Tensor]


class Examples:
    """Makes samples with any number of images or sounds for a folder's model.

    Args:
        folder: of the model.
        config: transformers' configuration.
        composite: what it is made of.

    Attributes:
        source: where they come from, in words.
    """

    def __init__(self, folder: Path, config: Any, composite: Composite) -> None:
        self._config, self._composite = config, composite
        self._generator = torch.Generator().manual_seed(0)
        self._processor: Any = None
        if composite.encoders and any((folder / name).is_file() for name in _PROCESSORS):
            from transformers import AutoProcessor

            self._processor = AutoProcessor.from_pretrained(folder)
        made = "tokens and inputs made up from the configuration"
        self.source = "the folder's processor" if self._processor else made

    def sample(self, items: int, number: int) -> Sample:
        """Make a sample.

        Args:
            items: images or sounds in it.
            number: makes samples differ in length.
        """
        if self._processor is not None:
            return self._processed(items, number)
        words = 12 + 3 * (number % 4)
        pieces, inputs = [self._text(words)], []
        for _ in range(items):
            part = self._composite.encoders[0]
            made, rows = self._item(part)
            inputs.append(made)
            pieces += self._around(torch.full((rows,), part.token_id)) + [self._text(3)]
        names = inputs[0] if inputs else ()
        joined = {name: torch.cat([each[name] for each in inputs]) for name in names}
        return Sample(torch.cat(pieces), joined)

    def padding(self, count: int) -> Tensor:
        """Return ids of ``count`` ordinary tokens."""
        return self._text(count)

    def _processed(self, items: int, number: int) -> Sample:
        part = self._composite.encoders[0]
        sound = any("feature" in name for name in part.inputs)
        kind = "audio" if sound else "image"
        media = [self._sound() if sound else self._raw_image(n + number) for n in range(items)]
        content = [{"type": kind, kind: each} for each in media]
        content.append({"type": "text", "text": _WORDS + " Go on." * (number % 4)})
        made = self._processor.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        return Sample(made["input_ids"][0], {n: made[n] for n in part.inputs if n in made})

    def _raw_image(self, number: int) -> Any:
        from PIL import Image

        size = (64 + 32 * (number % 3), 64 + 32 * (number % 2), 3)
        pixels = torch.randint(0, 256, size, generator=self._generator, dtype=torch.uint8)
        return Image.fromarray(pixels.numpy())

    def _sound(self) -> Any:
        return torch.randn(16_000, generator=self._generator).numpy() * 0.1

    def _text(self, count: int) -> Tensor:
        """Ordinary tokens: none that stands for something."""
        vocabulary = self._composite.language.config.vocab_size
        special = _special_tokens(self._config.to_dict())
        ordinary = torch.tensor([n for n in range(min(vocabulary, 50_000)) if n not in special])
        return ordinary[torch.randint(0, len(ordinary), (count,), generator=self._generator)]

    def _around(self, rows: Tensor) -> list[Tensor]:
        """The rows of an item between the tokens that begin and end one, if there are any."""
        names = ("vision_start_token_id", "vision_end_token_id")
        ends = [getattr(self._config, name, None) for name in names]
        if None in ends:
            return [rows]
        return [torch.tensor(ends[:1]), rows, torch.tensor(ends[1:])]

    def _item(self, part: EncoderPart) -> tuple[dict[str, Tensor], int]:
        """Inputs of an item, and its rows."""
        makers = {
            ("pixel_values",): self._image,
            ("pixel_values", "image_grid_thw"): self._patches,
            ("input_features", "feature_attention_mask"): self._spectrum,
        }
        if part.inputs not in makers:
            raise UnsupportedModelError(
                f"inputs {list(part.inputs)} cannot be made up; save the model's processor in its "
                "folder"
            )
        return makers[part.inputs](part.config)

    def _randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator)

    def _image(self, vision: Any) -> tuple[dict[str, Tensor], int]:
        side = vision.image_size
        rows = (side // vision.patch_size) ** 2
        full = getattr(self._config, "vision_feature_select_strategy", "default") == "full"
        if full and vision.model_type.startswith("clip"):
            rows += 1
        elif not full and not vision.model_type.startswith("clip"):
            rows -= 1
        return {"pixel_values": self._randn(1, 3, side, side)}, rows

    def _patches(self, vision: Any) -> tuple[dict[str, Tensor], int]:
        merge = vision.spatial_merge_size
        high, wide = (merge * int(n) for n in torch.randint(1, 4, (2,), generator=self._generator))
        width = 3 * vision.temporal_patch_size * vision.patch_size**2
        inputs = {
            "pixel_values": self._randn(high * wide, width),
            "image_grid_thw": torch.tensor([[1, high, wide]]),
        }
        return inputs, high * wide // merge**2

    def _spectrum(self, audio: Any) -> tuple[dict[str, Tensor], int]:
        steps = 2 * audio.max_source_positions
        length = int(torch.randint(8, steps + 1, (1,), generator=self._generator))
        inputs = {
            "input_features": self._randn(1, audio.num_mel_bins, steps),
            "feature_attention_mask": (torch.arange(steps) < length).long()[None],
        }
        return inputs, (length + 1) // 2 // 2


def _special_tokens(values: Mapping[str, Any]) -> set[int]:
    """Every token that a configuration names, also within."""
    found: set[int] = set()
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _special_tokens(value)
        elif str(name).endswith(("token_id", "token_index")) and value is not None:
            found |= set(value) if isinstance(value, Sequence) else {value}
    return found
