# SPDX-License-Identifier: Apache-2.0
"""Where the rows of one modality stand in a batch, and which rows an encoder replica holds.

Both are runs ``(start, length)`` of consecutive integers: images fill stretches of a sequence, so
a few runs say what thousands of positions would. Pure integers: no torch, no process group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# int64 (k, 2): starts and lengths.
Runs = np.ndarray


def runs_of(numbers: np.ndarray) -> Runs:
    """Return integers in any order as runs, in that order: int64 ``(n,)`` -> ``(k, 2)``.

    >>> runs_of(np.array([4, 5, 6, 0, 1])).tolist()
    [[4, 3], [0, 2]]
    """
    numbers = np.asarray(numbers, dtype=np.int64).reshape(-1)
    if not numbers.size:
        return np.empty((0, 2), dtype=np.int64)
    first = np.flatnonzero(np.diff(numbers, prepend=numbers[0] - 2) != 1)
    return np.stack([numbers[first], np.diff(first, append=numbers.size)], axis=1)


def expand(runs: Runs) -> np.ndarray:
    """Return all integers of the runs, in order: ``(k, 2)`` -> int64 ``(n,)``.

    >>> expand(np.array([[4, 3], [0, 2]])).tolist()
    [4, 5, 6, 0, 1]
    """
    starts, lengths = runs[:, 0], runs[:, 1]
    before = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum()), dtype=np.int64) + np.repeat(starts - before, lengths)


@dataclass(frozen=True, eq=False)
class TokenRuns:
    """The places of a modality's tokens in the batch of one language replica, in reading order.

    Row ``k`` of the replica belongs to the ``k``-th place.

    Attributes:
        batch: samples ``B`` of the replica; 1 for packed sequences.
        seq_len: tokens ``S`` of a sample.
        runs: places in the flattened ``(B * S)`` batch.
        cu_seqlens: cumulative padded lengths of packed sequences; ``None`` for dense ones.
    """

    batch: int
    seq_len: int
    runs: Runs
    cu_seqlens: tuple[int, ...] | None = None

    @classmethod
    def from_mask(cls, mask: np.ndarray, cu_seqlens: Sequence[int] | None = None) -> TokenRuns:
        """Return the runs of a bool ``(B, S)``: true where a token stands for a row.

        >>> found = TokenRuns.from_mask(np.array([[0, 1, 1, 1], [1, 0, 0, 1]], dtype=bool))
        >>> found.runs.tolist(), found.count
        ([[1, 4], [7, 1]], 5)
        """
        batch, seq_len = mask.shape
        return cls.from_positions(np.flatnonzero(mask), batch, seq_len, cu_seqlens)

    @classmethod
    def from_positions(
        cls,
        positions: np.ndarray,
        batch: int,
        seq_len: int,
        cu_seqlens: Sequence[int] | None = None,
    ) -> TokenRuns:
        """Return the runs of ascending places ``b * S + s``, int64 ``(n,)``."""
        packed = None if cu_seqlens is None else tuple(int(length) for length in cu_seqlens)
        return cls(batch, seq_len, runs_of(positions), packed)

    @property
    def count(self) -> int:
        """Tokens, which is rows."""
        return int(self.runs[:, 1].sum())

    def positions(self) -> np.ndarray:
        """Return every place, int64 ``(n,)``."""
        return expand(self.runs)


def consecutive(counts: Sequence[int]) -> list[Runs]:
    """Return the rows of replicas that hold ``counts`` rows each, one after another.

    >>> [runs.tolist() for runs in consecutive([3, 0, 2])]
    [[[0, 3]], [], [[3, 2]]]
    """
    ends = np.cumsum(np.asarray(counts, dtype=np.int64)).tolist()
    spans = zip(ends, counts, strict=True)
    return [np.array([[end - n, n]][: bool(n)], dtype=np.int64).reshape(-1, 2) for end, n in spans]


def rows_of_items(
    rows_per_item: Sequence[int] | np.ndarray, assignment: Sequence[Sequence[int] | np.ndarray]
) -> list[Runs]:
    """Return the rows of replicas that encode the given items (images), in the order given.

    Args:
        rows_per_item: rows of each item of the exchange group, in global order.
        assignment: the items of each encoder replica; every item occurs once.

    >>> [runs.tolist() for runs in rows_of_items([4, 1, 2], [[2, 0], [1]])]
    [[[5, 2], [0, 4]], [[4, 1]]]
    """
    lengths = np.asarray(rows_per_item, dtype=np.int64)
    starts = np.cumsum(lengths) - lengths
    chosen = [np.asarray(items, dtype=np.int64) for items in assignment]
    return [np.stack([starts[items], lengths[items]], axis=1) for items in chosen]


def rows_of_parts(items: Sequence[Sequence[int] | np.ndarray], parts: int) -> list[Runs]:
    """Return the rows of CP ranks that encode a part of each item, by replica, then by CP rank.

    The rule of :func:`split_items`: part ``c`` of an item of ``n`` rows are those from
    ``n * c // parts`` to ``n * (c + 1) // parts``.

    Args:
        items: rows of each whole item, of every replica, in order.
        parts: CP ranks of a replica.

    >>> [runs.tolist() for runs in rows_of_parts([[4, 3], [2]], 2)]
    [[[0, 2], [4, 1]], [[2, 2], [5, 2]], [[7, 1]], [[8, 1]]]
    """
    counts = [len(each) for each in items]
    lengths = np.concatenate([np.asarray(each, dtype=np.int64) for each in (*items, [])])
    runs = np.stack([np.cumsum(lengths) - lengths, lengths], axis=1)
    return parts_of_items(np.split(runs, np.cumsum(counts)[:-1]) if counts else [], parts)


def parts_of_items(held: Sequence[Runs], parts: int) -> list[Runs]:
    """Return the rows of CP ranks as :func:`rows_of_parts`, from those of their replicas.

    Args:
        held: of each replica, a run per item (:func:`rows_of_items`).
        parts: CP ranks of a replica.

    >>> [runs.tolist() for runs in parts_of_items(rows_of_items([4, 1, 2], [[2, 0], [1]]), 2)]
    [[[5, 1], [0, 2]], [[6, 1], [2, 2]], [], [[4, 1]]]
    """
    found = []
    for items in held:
        cuts = items[:, 1:] * np.arange(parts + 1) // parts
        runs = np.stack([items[:, :1] + cuts[:, :-1], np.diff(cuts)], axis=-1)
        found += [runs[runs[:, part, 1] > 0, part] for part in range(parts)]
    return found


def split_items(count: int, parts: int) -> list[range]:
    """Split ``count`` items in ``parts`` stretches whose lengths differ by one at most.

    >>> [list(part) for part in split_items(5, 3)]
    [[0], [1, 2], [3, 4]]
    """
    cuts = [count * part // parts for part in range(parts + 1)]
    return [range(start, stop) for start, stop in zip(cuts[:-1], cuts[1:], strict=True)]


def count_mismatch(name: str, tokens: int, rows: int) -> str:
    """Return the sentence for a modality whose rows do not match its tokens."""
    return f"Number of {name} tokens ({tokens}) does not match number of {name} embeddings ({rows})"
