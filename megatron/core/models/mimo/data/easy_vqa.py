# SPDX-License-Identifier: Apache-2.0
"""Images of coloured shapes and questions about them, out of the PyPI package ``easy-vqa``."""

from __future__ import annotations

import importlib.util
import json
from collections import defaultdict
from pathlib import Path

from megatron.core.models.mimo.data.conversation import Conversation, FileItem, Part, Turn, text
from megatron.core.models.mimo.data.sources import SourceError, fingerprint_of

_SPLITS = ("train", "test")


class EasyVqa:
    """Questions of a split: those of an image as turns of one conversation, or each by itself.

    Args:
        split: ``"train"`` (4,000 images, 38,575 questions) or ``"test"`` (1,000 and 9,673).
        together: an image's questions are turns of one conversation.
        images: take this many images of the split only; None for all.

    Attributes:
        questions: per sample its (question, answer) pairs.

    Raises:
        SourceError: the package is missing, or there is no such split.
    """

    def __init__(
        self, split: str, together: bool = True, images: int | None = None
    ) -> None:
        if split not in _SPLITS:
            raise SourceError(f"easy-vqa has no split {split!r}; it has {', '.join(_SPLITS)}")
        self._folder = package_folder() / "data" / split
        asked = json.loads((self._folder / "questions.json").read_text(encoding="utf-8"))
        by_image: dict[int, list[tuple[str, str]]] = defaultdict(list)
        for question, answer, image in asked:
            by_image[image].append((question, answer))
        kept = list(by_image.items())[:images]
        samples = kept if together else [(n, [pair]) for n, pairs in kept for pair in pairs]
        self._images = [image for image, _ in samples]
        self.questions = [pairs for _, pairs in samples]
        self._said = {"split": split, "together": together, "images": images}

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, number: int) -> Conversation:
        image = Part("image", "", FileItem(self._folder / "images" / f"{self._images[number]}.png"))
        turns: list[Turn] = []
        for question, answer in self.questions[number]:
            shown = () if turns else (image,)
            turns.append(Turn("user", (*shown, text(question))))
            turns.append(Turn("assistant", (text(answer),)))
        return Conversation(tuple(turns))

    def fingerprint(self) -> str:
        """Return text that changes when the questions do."""
        return fingerprint_of([self._folder / "questions.json"], self._said)


def package_folder() -> Path:
    """Return the folder of the installed package; it is not imported.

    Raises:
        SourceError: it is missing.
    """
    found = importlib.util.find_spec("easy_vqa")
    if found is None or found.origin is None:
        raise SourceError("the package is missing: easy_vqa; pip install 'easy-vqa>=1.0,<2'")
    return Path(found.origin).parent
