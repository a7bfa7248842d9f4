# SPDX-License-Identifier: Apache-2.0
"""Who owns a sequence position, for many positions at once: :mod:`.sequence_order` turned round.

Integers only: numpy, no torch, no groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron.core.models.mimo.partition.sequence_order import (
    SequenceShardError,
    check_divides,
    check_packed,
    shard_factor,
)


def position_owners(
    positions: np.ndarray,
    seq_len: int,
    cp_size: int,
    tp_size: int = 1,
    cu_seqlens: Sequence[int] | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return who owns each position, and where it lies there.

    The inverse of ``dense_positions`` and ``packed_positions``.

    Args:
        positions: int64 ``(n,)``, each in ``range(seq_len)``, in any order.
        seq_len: tokens of the dense sequence, or of all packed ones together.
        cp_size: ranks that the sequence is cut over.
        tp_size: TP ranks that share a CP-local sequence; 1 without sequence parallelism.
        cu_seqlens: cumulative lengths of packed sequences; ``None`` for a dense one.

    Returns:
        CP rank, TP rank and place in that rank's local sequence, each int64 ``(n,)``.

    >>> cp, tp, place = position_owners(np.arange(8), 8, 2)
    >>> cp.tolist(), place.tolist()
    ([0, 0, 1, 1, 1, 1, 0, 0], [0, 1, 0, 1, 2, 3, 2, 3])

    Raises:
        SequenceShardError: a length that cannot be cut, or ``cu_seqlens`` that do not end at
            ``seq_len``.
    """
    if cu_seqlens is None:
        check_divides(seq_len, shard_factor(cp_size, tp_size))
    else:
        _check_packed_total(cu_seqlens, seq_len, cp_size, tp_size)
    if cp_size == 1:
        cp_rank, local = np.zeros_like(positions), positions
    else:
        bounds = np.asarray([0, seq_len] if cu_seqlens is None else cu_seqlens, dtype=np.int64)
        # Of several equal bounds the last one counts: the others start empty sequences.
        sequence = np.searchsorted(bounds, positions, side="right") - 1
        start = bounds[sequence]
        length = (bounds[sequence + 1] - start) // (2 * cp_size)
        chunk, within = np.divmod(positions - start, length)
        cp_rank = np.minimum(chunk, 2 * cp_size - 1 - chunk)
        local = start // cp_size + within + np.where(chunk == cp_rank, 0, length)
    share = max(seq_len // (cp_size * tp_size), 1)
    return cp_rank, local // share, local % share


def _check_packed_total(
    cu_seqlens: Sequence[int], seq_len: int, cp_size: int, tp_size: int
) -> None:
    # Without CP nothing is cut sequence by sequence, so any lengths will do.
    if cp_size > 1:
        check_packed(cu_seqlens, cp_size)
    check_divides(seq_len, cp_size * tp_size)
    if cu_seqlens[-1] != seq_len:
        raise SequenceShardError(
            "A packed batch is one row whose length is the last entry of cu_seqlens, got rows of "
            f"{seq_len} tokens and cu_seqlens that end at {cu_seqlens[-1]}"
        )
