# SPDX-License-Identifier: Apache-2.0
"""Which keys the queries of a CP rank see, as segments laid end to end. Pure integers.

Of each sequence a rank has two chunks (:mod:`.sequence_order`). Under a causal mask the queries of
a chunk see all keys up to their own: a segment each, in which the last query and the last key are
the same token. Without the mask both chunks see the whole sequence: one segment. With cp = 2, rank
0 and a sequence of 8 tokens of which the last is padding (``.``)::

    tokens               a b | c d | e f | g .
    queries of rank 0    a b               g
    keys, causal         a b   a b c d e f g       two segments: 2 and 7 keys
    keys, bidirectional        a b c d e f g       one segment: 7 keys, 3 queries

Without CP a sequence is one chunk and one segment. Padding is in no segment. It ends its sequence,
so a rank's real rows of a sequence come first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, chain

from megatron.core.models.mimo.partition.sequence_order import (
    check_divides,
    cp_chunks,
    shard_factor,
)

# Real tokens and padding of a chunk.
_Part = tuple[int, int]


@dataclass(frozen=True)
class AttentionSegments:
    """The segments of one attention over packed sequences, on one CP rank.

    Attributes:
        queries: of each segment. End to end they are the real ones of the rank's rows, in order.
        keys: of each segment.
        rows: real tokens and padding, in turn, of each chunk of the rank.
        gathered: the same of all ranks' chunks, rank after rank.
        pieces: the chunks whose real tokens are the keys, as places in ``gathered``'s turns.
    """

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    rows: tuple[int, ...]
    gathered: tuple[int, ...]
    pieces: tuple[int, ...]

    def bounds(self) -> list[list[int]]:
        """Return cumulative lengths of queries and of keys, each with a leading 0."""
        return [list(accumulate(lengths, initial=0)) for lengths in (self.queries, self.keys)]


# The layers of a microbatch, and its backward pass, ask for the same.
@lru_cache(maxsize=8)
def attention_segments(
    padded: tuple[int, ...], real: tuple[int, ...], cp_rank: int, cp_size: int, causal: bool
) -> AttentionSegments:
    """Return the segments of a CP rank.

    Args:
        padded: global length of each sequence, padding included.
        real: global length of each sequence without its trailing padding.
        cp_rank: place in the CP group.
        cp_size: ranks of the CP group.
        causal: whether a query sees only what is not after it.

    >>> attention_segments((8,), (7,), 0, 2, True)  # doctest: +NORMALIZE_WHITESPACE
    AttentionSegments(queries=(2, 1), keys=(2, 7), rows=(2, 0, 1, 1),
                      gathered=(2, 0, 1, 1, 2, 0, 2, 0), pieces=(0, 0, 2, 3, 1))

    Raises:
        SequenceShardError: a padded length that ``2 * cp_size`` does not divide.
    """
    owned = [cp_chunks(rank, cp_size) if cp_size > 1 else (0,) for rank in range(cp_size)]
    sequences = [_parts(*lengths, cp_size) for lengths in zip(padded, real, strict=True)]
    places = natural_pieces(len(padded), cp_size)
    found = [
        segment
        for parts, place in zip(sequences, places, strict=True)
        for segment in _segments(parts, place, owned[cp_rank], causal)
    ]
    return AttentionSegments(
        queries=tuple(queries for queries, _, _ in found),
        keys=tuple(keys for _, keys, _ in found),
        rows=_joined(parts[chunk] for parts in sequences for chunk in owned[cp_rank]),
        gathered=_joined(parts[chunk] for own in owned for parts in sequences for chunk in own),
        pieces=_joined(pieces for _, _, pieces in found),
    )


def natural_pieces(num_sequences: int, cp_size: int) -> list[list[int]]:
    """Return where the chunks of each sequence are in a rank-major gather, in natural order.

    A rank's local tokens are, for each sequence, its two chunks one after the other. The gather
    lays the ranks end to end, which makes ``cp_size * num_sequences * 2`` pieces.

    >>> natural_pieces(1, 2)
    [[0, 2, 3, 1]]
    >>> natural_pieces(2, 1)
    [[0], [1]]
    """
    if cp_size == 1:
        return [[i] for i in range(num_sequences)]
    place = [0] * (2 * cp_size)
    for rank in range(cp_size):
        for half, chunk in enumerate(cp_chunks(rank, cp_size)):
            place[chunk] = rank * 2 * num_sequences + half
    return [[2 * i + p for p in place] for i in range(num_sequences)]


def _parts(padded: int, real: int, cp_size: int) -> list[_Part]:
    """The chunks of a sequence, in natural order."""
    chunks = shard_factor(cp_size)
    check_divides(padded, chunks)
    size = padded // chunks
    tokens = [min(max(real - chunk * size, 0), size) for chunk in range(chunks)]
    return [(count, size - count) for count in tokens]


def _segments(
    parts: Sequence[_Part], place: Sequence[int], own: Sequence[int], causal: bool
) -> Iterator[tuple[int, int, Sequence[int]]]:
    """Queries, keys and pieces of the segments of one sequence."""
    # Queries that see the same keys, and of how many chunks these are.
    alike = [([chunk], chunk + 1) for chunk in own] if causal else [(list(own), len(parts))]
    for chunks, seen in alike:
        queries = sum(parts[chunk][0] for chunk in chunks)
        if queries:
            yield queries, sum(tokens for tokens, _ in parts[:seen]), place[:seen]


def _joined(turns: Iterable[Sequence[int]]) -> tuple[int, ...]:
    return tuple(chain.from_iterable(turns))
