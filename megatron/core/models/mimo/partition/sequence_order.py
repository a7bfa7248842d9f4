# SPDX-License-Identifier: Apache-2.0
"""Which sequence positions a (cp, tp) coordinate owns. Pure integers: no torch, no groups.

A sequence of ``S`` tokens is cut into ``2 * cp`` equal chunks, numbered from the left. CP rank
``r`` owns chunk ``r`` and chunk ``2 * cp - 1 - r``: one early and one late chunk, so that every
rank has the same work under causal attention ("zigzag"). With cp = 2 and S = 8::

    position   0 1 | 2 3 | 4 5 | 6 7
    chunk       0  |  1  |  2  |  3
    CP rank     0  |  1  |  1  |  0

With sequence parallelism TP rank ``t`` owns the ``t``-th of ``tp`` equal, contiguous pieces of
that CP-local order. Packed sequences are cut one by one, each in its own ``2 * cp`` chunks.
"""

from __future__ import annotations

from collections.abc import Sequence


class SequenceShardError(ValueError, AssertionError):
    """A sequence that cannot be cut as asked.

    It is a caller's error, hence a ``ValueError``; stock Megatron-Core asserts the same
    condition, hence an ``AssertionError`` too, so that code that catches either keeps working.
    """


def cp_chunks(cp_rank: int, cp_size: int) -> tuple[int, int]:
    """Return the two chunk indices, out of ``2 * cp_size``, that a CP rank owns.

    >>> cp_chunks(1, 4)
    (1, 6)

    Raises:
        ValueError: ``cp_rank`` is outside ``range(cp_size)``.
    """
    _check_coordinate("cp", cp_rank, cp_size)
    return cp_rank, 2 * cp_size - 1 - cp_rank


def shard_factor(cp_size: int = 1, tp_size: int = 1) -> int:
    """Return what a dense sequence length must divide by: ``2 * cp`` (1 without CP) times ``tp``.

    ``tp_size`` is the TP size with sequence parallelism and 1 without it.

    >>> shard_factor(cp_size=2, tp_size=4), shard_factor(tp_size=4)
    (16, 4)
    """
    return (2 * cp_size if cp_size > 1 else 1) * tp_size


def dense_spans(seq_len: int, cp_rank: int, cp_size: int) -> list[tuple[int, int]]:
    """Return the half-open spans that a CP rank owns of a dense sequence, in local order.

    >>> dense_spans(8, 0, 2)
    [(0, 2), (6, 8)]
    >>> dense_spans(8, 0, 1)
    [(0, 8)]

    Raises:
        SequenceShardError: ``seq_len`` does not divide by ``2 * cp_size``.
    """
    _check_coordinate("cp", cp_rank, cp_size)
    check_divides(seq_len, shard_factor(cp_size))
    return _spans(0, seq_len, cp_rank, cp_size)


def dense_positions(
    seq_len: int, cp_rank: int, cp_size: int, tp_rank: int = 0, tp_size: int = 1
) -> list[int]:
    """Return the positions that a (cp, tp) coordinate owns of a dense sequence, in local order.

    ``tp_rank`` and ``tp_size`` are given with sequence parallelism only.

    >>> dense_positions(8, 0, 2)
    [0, 1, 6, 7]
    >>> dense_positions(8, 0, 2, tp_rank=1, tp_size=2)
    [6, 7]

    Raises:
        SequenceShardError: ``seq_len`` does not divide by ``2 * cp_size * tp_size``.
    """
    _check_coordinate("tp", tp_rank, tp_size)
    check_divides(seq_len, shard_factor(cp_size, tp_size))
    local = _expand(dense_spans(seq_len, cp_rank, cp_size))
    share = len(local) // tp_size
    return local[tp_rank * share : (tp_rank + 1) * share]


def packed_spans(cu_seqlens: Sequence[int], cp_rank: int, cp_size: int) -> list[tuple[int, int]]:
    """Return the half-open spans that a CP rank owns of packed sequences, in local order.

    Args:
        cu_seqlens: cumulative lengths with a leading 0, padding included: sequence ``i`` fills
            positions ``cu_seqlens[i] .. cu_seqlens[i + 1] - 1``.

    >>> packed_spans([0, 4, 12], 1, 2)
    [(1, 2), (2, 3), (6, 8), (8, 10)]

    Raises:
        SequenceShardError: ``cu_seqlens`` does not start at 0, decreases, or a sequence does
            not divide by ``2 * cp_size``.
    """
    _check_coordinate("cp", cp_rank, cp_size)
    check_packed(cu_seqlens, cp_size)
    spans: list[tuple[int, int]] = []
    for start, stop in zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True):
        if stop > start:
            spans += _spans(start, stop, cp_rank, cp_size)
    return spans


def packed_positions(cu_seqlens: Sequence[int], cp_rank: int, cp_size: int) -> list[int]:
    """Return the global positions that a CP rank owns of packed sequences, in local order.

    >>> packed_positions([0, 4, 12], 0, 2)
    [0, 3, 4, 5, 10, 11]

    Raises:
        SequenceShardError: as :func:`packed_spans`.
    """
    return _expand(packed_spans(cu_seqlens, cp_rank, cp_size))


def check_packed(cu_seqlens: Sequence[int], cp_size: int) -> None:
    """Refuse cumulative lengths that cannot be cut over ``cp_size`` ranks.

    Raises:
        SequenceShardError: fewer than two entries, a first entry that is not 0, a decrease, or
            a sequence length that ``2 * cp_size`` does not divide.
    """
    if len(cu_seqlens) < 2 or cu_seqlens[0] != 0:
        raise SequenceShardError(
            f"cu_seqlens must start with 0 and hold at least one sequence, got {list(cu_seqlens)}"
        )
    factor = shard_factor(cp_size)
    for index, (start, stop) in enumerate(zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True)):
        if stop < start:
            raise SequenceShardError(
                f"cu_seqlens must not decrease, but entry {index + 1} is {stop} after {start}"
            )
        if (stop - start) % factor:
            raise SequenceShardError(
                f"Packed sequence {index} has {stop - start} tokens, padding included, which is "
                f"not divisible by 2 * cp = {factor}; pad each sequence to a multiple of {factor}"
            )


def _spans(start: int, stop: int, cp_rank: int, cp_size: int) -> list[tuple[int, int]]:
    """The spans of one sequence that fills ``start .. stop - 1``; divisibility is checked."""
    if cp_size == 1:
        return [(start, stop)]
    length = (stop - start) // (2 * cp_size)
    return [(start + c * length, start + (c + 1) * length) for c in cp_chunks(cp_rank, cp_size)]


def _expand(spans: Sequence[tuple[int, int]]) -> list[int]:
    """All positions of the spans, in order."""
    return [position for start, stop in spans for position in range(start, stop)]


def check_divides(seq_len: int, factor: int) -> None:
    """Refuse a sequence length that ``factor`` does not divide.

    Raises:
        SequenceShardError: it does not; the message has the next length that does.
    """
    if seq_len % factor:
        raise SequenceShardError(
            f"Sequence length should be divisible by {factor} for Sequence/Context parallelism, "
            f"got {seq_len}; pad it to {-(-seq_len // factor) * factor}"
        )


def _check_coordinate(axis: str, rank: int, size: int) -> None:
    if size < 1 or not 0 <= rank < size:
        raise ValueError(f"{axis} rank must be in range({size}) for {axis} size {size}, got {rank}")
