# SPDX-License-Identifier: Apache-2.0
"""Text that is tokens already: files of uint16, mapped, cut into samples of one length."""

from __future__ import annotations

import glob
from pathlib import Path

import numpy as np

from megatron.core.models.mimo.data.batches import ItemRows
from megatron.core.models.mimo.data.sources import SourceError, fingerprint_of

_LIMIT = 1 << 16


class TokenFiles:
    """Samples of ``length + 1`` tokens, of which each is the next one's label; see ``Prepared``.

    Neighbours share a token, so every token but a file's first is learned once. What is left at
    a file's end is not used.

    Args:
        path: of a ``.bin`` file of uint16 in the byte order of this machine, or a pattern of some.
        length: tokens that a sample is trained on.
        vocabulary: of the model.

    Attributes:
        numbers: int64 ``(samples,)``: all of them.
        skipped: nothing is.
        first_skipped: empty.

    Raises:
        SourceError: there is no such file, one is too short, or a vocabulary has no place in
            uint16.
    """

    def __init__(self, path: str | Path, length: int, vocabulary: int) -> None:
        self._paths = sorted(Path(name) for name in glob.glob(str(Path(path).expanduser())))
        if not self._paths:
            raise SourceError(f"no file of tokens is called {path}")
        if length < 1 or vocabulary > _LIMIT:
            raise SourceError(
                f"length={length} and a vocabulary of {vocabulary}; a sample has at least 1 token, "
                f"and uint16 counts up to {_LIMIT}"
            )
        self._length, self._vocabulary = length, vocabulary
        self._files = [_mapped(file, length) for file in self._paths]
        self._ends = np.cumsum([(len(file) - 1) // length for file in self._files])
        self.numbers = np.arange(len(self))
        self.skipped: dict[str, int] = {}
        self.first_skipped = ""

    def __len__(self) -> int:
        return int(self._ends[-1])

    def lengths(self, samples: np.ndarray) -> np.ndarray:
        """Return the tokens of samples, int64 ``(n,)``."""
        return np.full(len(samples), self._length + 1, dtype=np.int64)

    def items(self, samples: np.ndarray) -> ItemRows:
        """Return the rows of samples' items, of which they have none."""
        return ItemRows(np.empty(0, dtype=np.int64), np.zeros(len(samples), dtype=np.int64))

    def grids(self, sample: int) -> np.ndarray:
        """Return the grids of a sample's items, of which it has none: int32 ``(0, 3)``.

        Raises:
            IndexError: there is no such sample.
        """
        self._check(sample)
        return np.zeros((0, 3), dtype=np.int32)

    def tokens(self, sample: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a sample's tokens and which of them are learned: int32, bool ``(n,)``.

        Raises:
            IndexError: there is no such sample.
            SourceError: a token is not of the vocabulary.
        """
        self._check(sample)
        file = int(np.searchsorted(self._ends, sample, side="right"))
        start = (sample - (int(self._ends[file - 1]) if file else 0)) * self._length
        ids = np.array(self._files[file][start : start + self._length + 1], dtype=np.int32)
        if ids.max() >= self._vocabulary:
            raise SourceError(
                f"{self._paths[file]} has token {ids.max()} near {start}, and the model's "
                f"vocabulary has {self._vocabulary}; were the files made for another tokenizer?"
            )
        return ids, np.ones(len(ids), dtype=bool)

    def _check(self, sample: int) -> None:
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} is not in 0..{len(self) - 1}")

    def fingerprint(self) -> str:
        """Return text that changes when a file is written."""
        return fingerprint_of(self._paths, {"length": self._length})


def _mapped(path: Path, length: int) -> np.ndarray:
    size = path.stat().st_size
    if size % 2 or size // 2 <= length:
        raise SourceError(
            f"{path} has {size} bytes, which is not two for each token or less than a sample of "
            f"{length + 1} tokens"
        )
    return np.memmap(path, dtype=np.uint16, mode="r")
