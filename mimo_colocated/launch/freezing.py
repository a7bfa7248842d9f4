# SPDX-License-Identifier: Apache-2.0
"""``--freeze``: the parts of a model that do not train, by name."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass

from mimo_colocated.launch.errors import JobError
from mimo_colocated.launch.layouts import LANGUAGE

_PARTS = ("encoder", "projector")


@dataclass(frozen=True)
class Freezable:
    """Names of what may be frozen: parts of every encoder, then those of one.

    The lower encoder is its embeddings and the lower half of its layers.

    Attributes:
        encoders: their names on the command line.

    >>> Freezable(("vision", "audio")).names
    ... # doctest: +NORMALIZE_WHITESPACE
    ('encoder', 'lower-encoder', 'projector', 'language',
     'vision-encoder', 'vision-projector', 'audio-encoder', 'audio-projector')
    """

    encoders: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        of_one = (f"{side}-{part}" for side in self.encoders for part in _PARTS)
        return ("encoder", "lower-encoder", "projector", LANGUAGE, *of_one)

    def parts(self, text: str) -> tuple[str, ...]:
        """Return the parts that the option names, such as ``"encoder+projector"``.

        Raises:
            argparse.ArgumentTypeError: an unknown part, or nothing is left to train.
        """
        parts = tuple(part for part in text.split("+") if part)
        for part in parts:
            if part not in self.names:
                raise argparse.ArgumentTypeError(
                    f"must be parts of {', '.join(self.names)}, joined by '+', got {text!r}"
                )
        if {*_PARTS, LANGUAGE} <= set(parts):
            raise argparse.ArgumentTypeError(f"must leave something to train, got {text!r}")
        return parts

    def read(self, text: str) -> str:
        """Return the option in its plain form; raises what :meth:`parts` raises."""
        return "+".join(self.parts(text))

    def each(self, text: str) -> set[str]:
        """Return the parts with each encoder's by its own name.

        >>> sorted(Freezable(("vision", "audio")).each("encoder+language"))
        ['audio-encoder', 'language', 'vision-encoder']
        """
        parts = set(self.parts(text))
        every = parts & set(_PARTS)
        return {f"{side}-{part}" for side in self.encoders for part in every} | parts - every

    def check(self, text: str, there: Iterable[str]) -> None:
        """Refuse to freeze all that trains.

        Args:
            text: of the option.
            there: the encoders that the job has.

        Raises:
            JobError: nothing is left.
        """
        whole = {LANGUAGE} | {f"{side}-{part}" for side in there for part in _PARTS}
        if whole <= self.each(text):
            raise JobError(f"--freeze: must leave something to train, got {text!r}")
