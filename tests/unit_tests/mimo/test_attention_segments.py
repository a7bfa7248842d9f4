# SPDX-License-Identifier: Apache-2.0
"""Segments of packed attention against their definition: token by token, who sees whom."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.core.models.mimo.partition.attention_segments import attention_segments
from megatron.core.models.mimo.partition.sequence_order import SequenceShardError, dense_positions


@st.composite
def packings(draw):
    """CP size, padded and real lengths; empty sequences and empty chunks among them."""
    cp = draw(st.integers(1, 6))
    counts = draw(st.lists(st.integers(0, 3), min_size=1, max_size=5))
    padded = tuple(count * (2 * cp if cp > 1 else 1) for count in counts)
    return cp, padded, tuple(draw(st.integers(0, length)) for length in padded)


@given(packings(), st.booleans())
def test_every_query_sees_what_it_should(packing, causal: bool) -> None:
    cp, padded, real = packing
    owned = [
        [(i, p) for i, n in enumerate(padded) for p in dense_positions(n, rank, cp)]
        for rank in range(cp)
    ]
    for rank in range(cp):
        segments = attention_segments(padded, real, rank, cp, causal)
        assert taken([t for each in owned for t in each], segments.gathered, padding=True) == [
            (i, p) for each in owned for i, p in each if p >= real[i]
        ]
        pieces = turns([t for each in owned for t in each], segments.gathered)[::2]
        keys = [token for place in segments.pieces for token in pieces[place]]
        queries = taken(owned[rank], segments.rows)
        assert queries == [(i, p) for i, p in owned[rank] if p < real[i]]
        assert (len(queries), len(keys)) == (sum(segments.queries), sum(segments.keys))
        seen = {}
        for q_count, k_count in zip(segments.queries, segments.keys, strict=True):
            assert q_count
            for at in range(q_count):
                last = k_count - q_count + at + 1 if causal else k_count
                seen[queries[at]] = keys[:last]
            queries, keys = queries[q_count:], keys[k_count:]
        for (i, p), there in seen.items():
            assert there == [(i, k) for k in range(p + 1 if causal else real[i])]


def turns(tokens: list, counts: tuple[int, ...]) -> list[list]:
    """Tokens cut into so many each."""
    found, rest = [], list(tokens)
    for count in counts:
        found.append(rest[:count])
        rest = rest[count:]
    assert not rest
    return found


def taken(tokens: list, counts: tuple[int, ...], padding: bool = False) -> list:
    return [token for turn in turns(tokens, counts)[padding::2] for token in turn]


def test_without_a_mask_a_sequence_is_one_segment() -> None:
    segments = attention_segments((8, 8), (8, 5), 1, 2, False)
    assert (segments.queries, segments.keys) == ((4, 3), (8, 5))
    assert segments.bounds() == [[0, 4, 7], [0, 8, 13]]


def test_a_length_that_cp_cannot_cut_is_refused() -> None:
    with pytest.raises(SequenceShardError, match="divisible by 4 .* got 6"):
        attention_segments((8, 6), (8, 6), 0, 2, True)
