# SPDX-License-Identifier: Apache-2.0
"""The parts of all ranks are the whole tensors, each element once, whatever the cut."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.core.models.mimo.huggingface.cuts import (
    QKV,
    Along,
    Cut,
    FusedQKV,
    Gated,
    Heads,
    Shard,
    Vocabulary,
    Whole,
)
from megatron.core.models.mimo.huggingface.tables import line

pytestmark = pytest.mark.once

sizes = st.sampled_from([1, 2, 4, 8])


def _lengths(cut: Cut, size: int, heads: Heads) -> list[int]:
    query, key = heads.query * heads.width, heads.groups * heads.width
    if isinstance(cut, FusedQKV):
        return [query + 2 * key]
    if isinstance(cut, QKV):
        return [query, key, key]
    return [24 * size + (3 if isinstance(cut, Vocabulary) else 0)] * cut.sources


@given(
    size=sizes,
    groups=st.integers(1, 3),
    share=st.integers(1, 3),
    width=st.integers(1, 5),
    cut=st.sampled_from([Along(), Along(1), Vocabulary(), QKV(), FusedQKV(), Gated()]),
)
def test_every_element_has_one_place(
    size: int, groups: int, share: int, width: int, cut: Cut
) -> None:
    heads = Heads(groups * size * share, groups * size, width)
    lengths = _lengths(cut, size, heads)
    taken: Counter[tuple[int, int]] = Counter()
    for rank in range(size):
        shard = Shard(rank, size)
        runs = cut.runs(lengths, shard, heads)
        filled = [place for run in runs for place in range(run.at, run.at + run.size)]
        assert filled == list(range(len(filled)))  # one after another, no gap
        assert len(filled) <= cut.length(lengths, shard, heads)
        taken.update((r.source, r.start + n) for r in runs for n in range(r.size))
    everything = {(source, n) for source, length in enumerate(lengths) for n in range(length)}
    assert taken == Counter(everything)


def test_whole_is_on_every_rank() -> None:
    for rank in range(4):
        (run,) = Whole().runs([7], Shard(rank, 4), Heads(1, 1, 1))
        assert (run.start, run.at, run.size) == (0, 0, 7)


def test_query_groups_follow_each_other() -> None:
    """Two groups of three query heads, one channel each; rank 1 of 2 has the second group."""
    runs = QKV().runs([6, 2, 2], Shard(1, 2), Heads(6, 2, 1))
    assert [(run.source, run.start, run.at, run.size) for run in runs] == [
        (0, 3, 0, 3),
        (1, 1, 3, 1),
        (2, 1, 4, 1),
    ]


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_padding_does_not_depend_on_tp(tp: int) -> None:
    cut, heads = Vocabulary(), Heads(1, 1, 1)
    parts = [cut.length([130], Shard(rank, tp), heads) for rank in range(tp)]
    assert sum(parts) == 256


def test_lines_of_a_table_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"x\.qkv: QKV is made of 3 tensors, got \['x\.q'\]"):
        line("x.qkv", "x.q", QKV())
    with pytest.raises(ValueError, match=r"l\.\{\}\.w and \['w'\] differ in their number of {}"):
        line("l.{}.w", "w", Along())


def test_what_does_not_divide_is_said() -> None:
    with pytest.raises(ValueError, match="number of key/value heads 2 is not divisible by 4 ranks"):
        QKV().runs([8, 2, 2], Shard(0, 4), Heads(8, 2, 1))
    with pytest.raises(ValueError, match="width of the MLP 6 is not divisible by 4 ranks"):
        Gated().runs([6, 6], Shard(0, 4), Heads(1, 1, 1))
