# SPDX-License-Identifier: Apache-2.0
"""Small images, a small model's text, and sources of a few samples, made by the tests."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from PIL import Image
from tokenizers.processors import TemplateProcessing

from megatron.core.models.mimo.data.conversation import (
    BytesItem,
    Conversation,
    Part,
    SampleError,
    Turn,
    text,
)
from megatron.core.models.mimo.data.prepared import Piece, keep, write
from mimo_colocated.train.easy_vqa_model import train_tokenizer

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for p in m.content %}{% if p.type == 'image' %}<image>{% else %}{{ p.text }}"
    "{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIDE, PATCH = 8, 4
ROWS = (SIDE // PATCH) ** 2
WORDS = ("what is this a red blue circle square it is yes no user assistant system " * 3,)


def png(shade: int, size: tuple[int, int] = (SIDE, SIDE)) -> bytes:
    """An image of one shade."""
    file = io.BytesIO()
    Image.new("RGB", size, (shade, 2 * shade % 256, 0)).save(file, "PNG")
    return file.getvalue()


def photo(folder: Path, orientation: int) -> Path:
    """A JPEG of a camera held in one of Exif's eight ways, each corner of another shade."""
    made = Image.new("L", (40, 20), 0)
    made.paste(80, (20, 0, 40, 10))
    made.paste(160, (0, 10, 20, 20))
    made.paste(240, (20, 10, 40, 20))
    exif = made.getexif()
    exif[0x0112] = orientation
    made.save(folder / f"{orientation}.jpg", exif=exif)
    return folder / f"{orientation}.jpg"


def image(shade: int) -> Part:
    return Part("image", "", BytesItem(png(shade), f"image {shade}"))


def said(question: Sequence[Part | str], answer: str) -> tuple[Turn, Turn]:
    parts = tuple(text(each) if isinstance(each, str) else each for each in question)
    return Turn("user", parts), Turn("assistant", (text(answer),))


class Listed:
    """A source of conversations that are given; an error is raised in its place."""

    def __init__(self, samples: Sequence[Conversation | SampleError]) -> None:
        self.samples = list(samples)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: int) -> Conversation:
        found = self.samples[number]
        if isinstance(found, SampleError):
            raise found
        return found

    def fingerprint(self) -> str:
        return str(len(self))


def begin_texts(tokenizer: Any, opening: str) -> None:
    """Let a tokenizer put a token before every text, as Llama's does."""
    tokenizer.add_special_tokens({"bos_token": opening})
    known = [(opening, tokenizer.convert_tokens_to_ids(opening))]
    added = TemplateProcessing(single=f"{opening} $A", special_tokens=known)
    tokenizer.backend_tokenizer.post_processor = added


def save_text(
    folder: Path, template: str | None = TEMPLATE, opening: str = "", end: str | None = "<|im_end|>"
) -> Any:
    """Tokenizer, which may put a token before every text, and LLaVA processor in a folder."""
    tokenizer = train_tokenizer(WORDS)
    if end is None:
        tokenizer.eos_token = None
    else:
        tokenizer.add_special_tokens({"eos_token": end})
    if opening:
        begin_texts(tokenizer, opening)
    processor = transformers.LlavaProcessor(
        transformers.SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=template,
    )
    processor.save_pretrained(folder)
    return processor


def save(folder: Path, pieces: Sequence[Piece], key: str) -> None:
    """Write what ``Prepared`` opens, as the ranks of a job do."""
    kept = [folder.with_name(f"{folder.name}.{number}") for number in range(len(pieces))]
    for piece, place in zip(pieces, kept, strict=True):
        keep(piece, place)
    write(folder, kept, key)
