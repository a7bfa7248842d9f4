# SPDX-License-Identifier: Apache-2.0
"""Which sample stands where: a function of (seed, position), whatever the ranks.

A run that goes on from a position on any number of ranks sees what it would have seen.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Order:
    """The endless order of the samples of one or several sources.

    In an epoch a source's samples are seen ``weight`` times: ``1`` once each, ``2`` twice, ``0.25``
    every fourth of them, another fourth in the next epoch. What an epoch holds is exact; its
    order is drawn from the seed and its number.

    >>> order = Order(counts=(4, 2), weights=(1.0, 2.0), seed=7)
    >>> order.epoch_size
    8
    >>> sources, samples = order.at(0, 8)
    >>> sorted(zip(sources.tolist(), samples.tolist()))
    [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 0), (1, 1), (1, 1)]

    Attributes:
        counts: samples of each source.
        weights: of each source.
        seed: of the order.

    Raises:
        ValueError: another number of weights than counts, a weight that is not above 0, or a
            source of which an epoch would hold nothing.
    """

    counts: tuple[int, ...]
    weights: tuple[float, ...]
    seed: int

    def __post_init__(self) -> None:
        if len(self.counts) != len(self.weights) or not self.counts:
            raise ValueError(
                f"{len(self.counts)} sources and {len(self.weights)} weights; give one weight each"
            )
        for number, (count, weight) in enumerate(zip(self.counts, self.weights, strict=True)):
            if not weight > 0 or round(count * weight) < 1:
                raise ValueError(
                    f"source {number} has {count} samples and weight {weight}, so an epoch would "
                    "hold none of it; give more samples or a larger weight, or leave it out"
                )

    @property
    def per_epoch(self) -> tuple[int, ...]:
        """How many samples of each source an epoch holds."""
        pairs = zip(self.counts, self.weights, strict=True)
        return tuple(round(count * weight) for count, weight in pairs)

    @property
    def epoch_size(self) -> int:
        """Samples of an epoch."""
        return sum(self.per_epoch)

    def at(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the sources and samples at ``count`` positions from ``start``, int64 ``(count,)``.

        Raises:
            ValueError: a negative position.
        """
        if start < 0 or count < 0:
            raise ValueError(f"positions begin at 0, got {count} from {start}")
        positions = np.arange(start, start + count)
        epochs, places = np.divmod(positions, self.epoch_size)
        found = np.empty((2, count), dtype=np.int64)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            found[:, here] = _epoch(self, epoch)[:, places[here]]
        return found[0], found[1]


@functools.lru_cache(maxsize=4)
def _epoch(order: Order, epoch: int) -> np.ndarray:
    """Sources and samples of an epoch, int64 ``(2, epoch_size)``."""
    pieces = []
    for source, (count, own) in enumerate(zip(order.counts, order.per_epoch, strict=True)):
        samples = _stream(order.seed, source, count, range(epoch * own, (epoch + 1) * own))
        pieces.append(np.stack([np.full(own, source), samples]))
    drawn = np.random.default_rng([order.seed, epoch, 0]).permutation(order.epoch_size)
    return np.concatenate(pieces, axis=1)[:, drawn]


def _stream(seed: int, source: int, count: int, places: Sequence[int]) -> np.ndarray:
    """What stands at consecutive places of a source's own order, all of it pass after pass."""
    passes, within = np.divmod(np.asarray(places), count)
    found = np.empty(len(within), dtype=np.int64)
    for number in np.unique(passes).tolist():
        drawn = np.random.default_rng([seed, number, 1, source]).permutation(count)
        found[passes == number] = drawn[within[passes == number]]
    return found
