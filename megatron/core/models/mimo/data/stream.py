# SPDX-License-Identifier: Apache-2.0
"""The samples of a run, one global batch after another, from any position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megatron.core.models.mimo.data.batches import ItemRows, first_fit, padded


class Places(Protocol):
    """Says which sample stands where, as :class:`.Order` does."""

    def at(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the sources and samples at positions, int64 ``(count,)``."""
        ...


class Samples(Protocol):
    """Samples that are tokens, numbered from 0, as :class:`.Prepared` has them."""

    @property
    def numbers(self) -> np.ndarray:
        """Of each in its source, int64 ``(n,)``."""
        ...

    def __len__(self) -> int: ...

    def lengths(self, samples: np.ndarray) -> np.ndarray:
        """Return the tokens of samples, int64 ``(n,)``."""
        ...

    def items(self, samples: np.ndarray) -> ItemRows:
        """Return the rows of samples' items."""
        ...

    def grids(self, sample: int) -> np.ndarray:
        """Return the grids of a sample's items, int32 ``(items, 3)``."""
        ...

    def tokens(self, sample: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a sample's tokens and which of them are learned: int32, bool ``(n,)``."""
        ...


@dataclass(frozen=True, eq=False)
class GlobalBatch:
    """The samples of a step, whatever the layout.

    Attributes:
        start, stop: positions in the order.
        sources, samples: of each position, int64 ``(n,)``.
        lengths: tokens of each.
    """

    start: int
    stop: int
    sources: np.ndarray
    samples: np.ndarray
    lengths: np.ndarray


@dataclass(frozen=True)
class BatchSize:
    """How much a global batch holds: so many samples, or as many as fit into sequences.

    Attributes:
        samples: 0 if sequences are filled.
        sequences: how many are filled, each to ``capacity`` tokens; 0 if samples are counted.
        capacity: of a sequence.
        multiple: that samples are padded to in a sequence; it must not depend on the layout.
    """

    samples: int
    sequences: int
    capacity: int
    multiple: int


class SampleStream:
    """Global batches from positions.

    Args:
        order: of the samples.
        prepared: of each source of the order.
        size: of a batch.
    """

    def __init__(self, order: Places, prepared: Sequence[Samples], size: BatchSize) -> None:
        self.order, self.prepared, self.size = order, list(prepared), size

    def batch(self, start: int) -> GlobalBatch:
        """Return the batch that begins at a position; the next begins at its ``stop``."""
        if not self.size.sequences:
            return self._taken(start, self.size.samples)
        # Every sample has a token at least, so no more than this can fit.
        most = self.size.sequences * max(1, self.size.capacity // self.size.multiple)
        count = min(most, 16 * self.size.sequences)
        while True:
            taken = self._taken(start, count)
            whole = padded(taken.lengths, self.size.multiple)
            fits = sum(map(len, first_fit(whole, self.size.sequences, self.size.capacity)))
            if fits < count or count == most:
                return self._taken(start, fits)
            count = min(2 * count, most)

    def items(self, batch: GlobalBatch) -> ItemRows:
        """Return the rows of a batch's items."""
        parts = []
        for source in np.unique(batch.sources).tolist():
            here = np.flatnonzero(batch.sources == source)
            parts.append((here, self.prepared[source].items(batch.samples[here])))
        return ItemRows.joined(parts, len(batch.sources))

    def _taken(self, start: int, count: int) -> GlobalBatch:
        sources, samples = self.order.at(start, count)
        lengths = np.empty(count, dtype=np.int64)
        for source in np.unique(sources).tolist():
            here = sources == source
            lengths[here] = self.prepared[source].lengths(samples[here])
        return GlobalBatch(start, start + count, sources, samples, lengths)
