# SPDX-License-Identifier: Apache-2.0
"""Sequence ownership: pure integers, no process group.

The oracle is written from the rule in words: number the chunks, give each to its owner.
"""

from __future__ import annotations

import doctest
import subprocess
import sys

import pytest

from megatron.core.models.mimo.partition import sequence_order
from megatron.core.models.mimo.partition.sequence_order import (
    SequenceShardError,
    check_packed,
    cp_chunks,
    dense_positions,
    dense_spans,
    packed_positions,
    packed_spans,
    shard_factor,
)

pytestmark = pytest.mark.once

CP_SIZES = [1, 2, 3, 4, 8]


def owner(position: int, seq_len: int, cp_size: int) -> int:
    """The CP rank that owns one position of a dense sequence."""
    chunk = position // (seq_len // (2 * cp_size))
    return min(chunk, 2 * cp_size - 1 - chunk)


def test_docstring_examples():
    outcome = doctest.testmod(sequence_order)
    assert outcome.attempted >= 8
    assert outcome.failed == 0


@pytest.mark.parametrize("cp_size", CP_SIZES)
def test_chunks_are_an_early_and_a_late_one(cp_size):
    owned = [cp_chunks(rank, cp_size) for rank in range(cp_size)]
    assert sorted(chunk for pair in owned for chunk in pair) == list(range(2 * cp_size))
    assert {early + late for early, late in owned} == {2 * cp_size - 1}


@pytest.mark.parametrize("cp_size", CP_SIZES)
@pytest.mark.parametrize("per_chunk", [1, 3])
def test_dense_positions_against_the_rule(cp_size, per_chunk):
    seq_len = 2 * cp_size * per_chunk
    for rank in range(cp_size):
        expected = [p for p in range(seq_len) if owner(p, seq_len, cp_size) == rank]
        assert dense_positions(seq_len, rank, cp_size) == expected
        spans = dense_spans(seq_len, rank, cp_size)
        assert [p for start, stop in spans for p in range(start, stop)] == expected


@pytest.mark.parametrize("cp_size", [1, 2, 4])
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_sequence_parallel_pieces_follow_the_cp_local_order(cp_size, tp_size):
    seq_len = 2 * cp_size * tp_size * 3
    for rank in range(cp_size):
        pieces = [dense_positions(seq_len, rank, cp_size, t, tp_size) for t in range(tp_size)]
        assert {len(piece) for piece in pieces} == {seq_len // (cp_size * tp_size)}
        assert sum(pieces, []) == dense_positions(seq_len, rank, cp_size)


@pytest.mark.parametrize("cp_size", CP_SIZES)
def test_packed_positions_are_each_sequence_s_dense_positions(cp_size):
    lengths = [2 * cp_size, 6 * cp_size, 0, 4 * cp_size]
    cu_seqlens = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    for rank in range(cp_size):
        expected = [
            start + p
            for start, length in zip(cu_seqlens[:-1], lengths, strict=True)
            for p in dense_positions(length, rank, cp_size)
        ]
        assert packed_positions(cu_seqlens, rank, cp_size) == expected
    everyone = sum((packed_positions(cu_seqlens, r, cp_size) for r in range(cp_size)), [])
    assert sorted(everyone) == list(range(cu_seqlens[-1]))


def test_packing_one_sequence_is_dense():
    assert packed_spans([0, 24], 1, 3) == dense_spans(24, 1, 3)


@pytest.mark.parametrize(
    ("cp_size", "tp_size", "factor"), [(1, 1, 1), (2, 1, 4), (1, 4, 4), (2, 4, 16), (8, 1, 16)]
)
def test_shard_factor(cp_size, tp_size, factor):
    assert shard_factor(cp_size, tp_size) == factor


def test_a_length_that_does_not_divide_names_the_factor_and_a_length_that_does():
    with pytest.raises(SequenceShardError, match=r"divisible by 8 .*got 12; pad it to 16"):
        dense_positions(12, 0, 2, 0, 2)
    with pytest.raises(SequenceShardError, match=r"divisible by 4 .*got 6; pad it to 8"):
        dense_spans(6, 0, 2)


@pytest.mark.parametrize("kind", [ValueError, AssertionError])
def test_the_error_is_caught_as_either_kind(kind):
    with pytest.raises(kind):
        dense_positions(5, 0, 2)


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        ([0, 8, 14], r"Packed sequence 1 has 6 tokens.*2 \* cp = 4"),
        ([0, 8, 4], r"must not decrease, but entry 2 is 4 after 8"),
        ([4, 8], r"must start with 0.*\[4, 8\]"),
        ([0], r"at least one sequence.*\[0\]"),
    ],
)
def test_packed_lengths_that_cannot_be_cut(cu_seqlens, message):
    with pytest.raises(SequenceShardError, match=message):
        check_packed(cu_seqlens, 2)
    with pytest.raises(SequenceShardError, match=message):
        packed_positions(cu_seqlens, 0, 2)


@pytest.mark.parametrize(("rank", "size"), [(2, 2), (-1, 2), (0, 0)])
def test_a_rank_outside_its_axis(rank, size):
    with pytest.raises(ValueError, match=rf"cp rank must be in range\({size}\).*got {rank}"):
        cp_chunks(rank, size)
    with pytest.raises(ValueError, match=rf"tp rank must be in range\({size}\).*got {rank}"):
        dense_positions(8, 0, 1, rank, size)


def test_the_module_itself_needs_no_torch():
    code = (
        "import runpy, sys; sys.modules['torch'] = None;"
        f"runpy.run_path({sequence_order.__file__!r})"
    )
    assert subprocess.run([sys.executable, "-S", "-c", code], timeout=60).returncode == 0
