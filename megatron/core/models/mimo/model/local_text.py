# SPDX-License-Identifier: Apache-2.0
"""Which text tokens a rank embeds, and where they stand in its part of the sequence. Integers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from megatron.core.models.mimo.comm.plan.token_runs import TokenRuns
from megatron.core.models.mimo.partition.sequence_order import dense_spans, packed_spans


@dataclass(frozen=True, eq=False)
class LocalText:
    """The text tokens of a CP rank, and among them those of one TP rank.

    All TP ranks look up the same tokens, since each has a part of the vocabulary. With sequence
    parallelism a TP rank then keeps the tokens of its own part of the sequence.

    Attributes:
        index: int64 ``(T,)``: places in the flattened ``(B * S)`` batch, to look up.
        kept: int64: which of them stay; ``None`` for all.
        place: int64: where those go in the flattened ``(S_local * B)``.
    """

    index: np.ndarray
    kept: np.ndarray | None
    place: np.ndarray

    @classmethod
    def find(
        cls,
        batch: TokenRuns,
        others: Iterable[TokenRuns],
        cp: tuple[int, int],
        tp: tuple[int, int] | None,
    ) -> LocalText:
        """Return the tokens of a rank's part that stand for no modality's row.

        >>> tokens = TokenRuns.from_positions(np.array([1, 2]), batch=1, seq_len=8)
        >>> text = LocalText.find(tokens, [tokens], cp=(0, 2), tp=(0, 2))
        >>> text.index.tolist(), text.kept.tolist(), text.place.tolist()
        ([0, 6, 7], [0], [0])

        Args:
            batch: tells batch size, sequence length and packing of the language replica.
            others: the token places of every modality.
            cp: this rank's (rank, size) of context parallelism.
            tp: the same of TP with sequence parallelism; ``None`` without it.
        """
        is_text = np.ones(batch.batch * batch.seq_len, dtype=bool)
        for tokens in others:
            is_text[tokens.positions()] = False
        packed = batch.cu_seqlens
        spans = dense_spans(batch.seq_len, *cp) if packed is None else packed_spans(packed, *cp)
        mine = np.concatenate([np.arange(*span) for span in spans] or [np.arange(0)])
        sample, local = np.nonzero(is_text.reshape(batch.batch, batch.seq_len)[:, mine])
        index = sample * batch.seq_len + mine[local]
        if tp is None:
            return cls(index, None, local * batch.batch + sample)
        share = max(mine.size // tp[1], 1)
        kept = np.flatnonzero(local // share == tp[0])
        return cls(index, kept, local[kept] % share * batch.batch + sample[kept])
