# SPDX-License-Identifier: Apache-2.0
"""Samples cut into equal runs in the order of replicas, and epochs in orders of their own."""

from __future__ import annotations

import numpy as np


def shuffled(positions: np.ndarray, total: int, seed: int) -> np.ndarray:
    """Return which of ``total`` items stand at positions of an endless stream.

    Every item comes once per epoch, in an order that is drawn from the seed and the epoch.

    Args:
        positions: ascending, int64.
        total: items.
        seed: of the orders.
    """
    epochs, chosen = positions // total, np.empty_like(positions)
    for epoch in np.unique(epochs):
        order = np.random.default_rng([seed, int(epoch), 0]).permutation(total)
        chosen[epochs == epoch] = order[positions[epochs == epoch] % total]
    return chosen


def even_slice(count: int, index: int, parts: int, whole: str, part: str) -> tuple[int, int]:
    """Return ``(start, size)`` of part ``index`` of ``count`` samples, cut into equal ``parts``.

    >>> even_slice(8, 1, 4, "microbatch", "DP ranks")
    (2, 2)

    Raises:
        ValueError: when ``parts`` does not divide ``count`` or ``index`` is out of range.
    """
    if parts < 1 or count % parts:
        raise ValueError(
            f"a {whole} of {count} samples cannot be divided evenly over {parts} {part}; "
            f"use a multiple of {max(parts, 1)} samples"
        )
    if not 0 <= index < parts:
        raise ValueError(f"index {index} is not in 0..{parts - 1} of the {parts} {part}")
    return index * (count // parts), count // parts
