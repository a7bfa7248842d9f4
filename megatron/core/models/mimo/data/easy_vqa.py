# SPDX-License-Identifier: Apache-2.0
"""Images of coloured shapes and questions about them, out of the PyPI package ``easy-vqa``."""

from __future__ import annotations

import importlib.util
import json
import random
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
        turns: a conversation has at most so many, drawn for each sample and in any order: a
            question for the shape, one for the colour, the others to be answered by yes or no.
            None: all, as the package has them. Early answers tell later ones (whether there is a
            circle, then what shape it is), so few turns teach more of the image.
        draws: samples that an image gives; more than one need ``turns``.

    Attributes:
        questions: per sample its (question, answer) pairs.

    Raises:
        SourceError: the package is missing, there is no such split, or turns are asked for where
            there are none.
    """

    def __init__(
        self,
        split: str,
        together: bool = True,
        images: int | None = None,
        turns: int | None = None,
        draws: int = 1,
    ) -> None:
        if split not in _SPLITS:
            raise SourceError(f"easy-vqa has no split {split!r}; it has {', '.join(_SPLITS)}")
        if turns is not None and (turns < 1 or not together):
            raise SourceError(f"turns={turns} has to be at least 1, with together: true")
        if draws < 1 or (draws > 1 and turns is None):
            raise SourceError(f"draws={draws} has to be at least 1, and more than one need turns")
        self._folder = package_folder() / "data" / split
        asked = json.loads((self._folder / "questions.json").read_text(encoding="utf-8"))
        by_image: dict[int, list[tuple[str, str]]] = defaultdict(list)
        for question, answer, image in asked:
            by_image[image].append((question, answer))
        kept = list(by_image.items())[:images]
        samples = kept if together else [(n, [pair]) for n, pairs in kept for pair in pairs]
        if turns is not None:
            by_chance = random.Random(0)
            samples = [
                (n, _drawn(by_chance, pairs, turns)) for _ in range(draws) for n, pairs in samples
            ]
        self._images = [image for image, _ in samples]
        self.questions = [pairs for _, pairs in samples]
        self._said = {"split": split, "together": together, "images": images}
        if turns is not None:  # what was said before there were any stays as it was
            self._said |= {"turns": turns, "draws": draws}

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, number: int) -> Conversation:
        image = Part("image", "", FileItem(self.image(number)))
        turns: list[Turn] = []
        for question, answer in self.questions[number]:
            shown = () if turns else (image,)
            turns.append(Turn("user", (*shown, text(question))))
            turns.append(Turn("assistant", (text(answer),)))
        return Conversation(tuple(turns))

    def image(self, number: int) -> Path:
        """Return the file of a sample's image."""
        return self._folder / "images" / f"{self._images[number]}.png"

    def fingerprint(self) -> str:
        """Return text that changes when the questions do."""
        return fingerprint_of([self._folder / "questions.json"], self._said)


def _drawn(
    by_chance: random.Random, pairs: list[tuple[str, str]], turns: int
) -> list[tuple[str, str]]:
    """At most so many of an image's questions: one of each kind, then others of yes or no."""
    kinds: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for pair in pairs:
        kinds["" if pair[1] in ("yes", "no") else pair[1]].append(pair)
    found = [by_chance.choice(each) for each in kinds.values()]
    by_chance.shuffle(found)
    others = [pair for pair in kinds[""] if pair not in found]
    found = [*found, *by_chance.sample(others, len(others))][:turns]
    by_chance.shuffle(found)
    return found


def package_folder() -> Path:
    """Return the folder of the installed package; it is not imported.

    Raises:
        SourceError: it is missing.
    """
    found = importlib.util.find_spec("easy_vqa")
    if found is None or found.origin is None:
        raise SourceError("the package is missing: easy_vqa; pip install 'easy-vqa>=1.0,<2'")
    return Path(found.origin).parent
