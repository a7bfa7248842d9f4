# SPDX-License-Identifier: Apache-2.0
"""Arrays of one replica's samples: rows of one length, or all end to end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron.core.models.mimo.comm.plan.token_runs import TokenRuns

Tokens = tuple[np.ndarray, np.ndarray]
"""A sample's ids, and which of them are learned."""


@dataclass(frozen=True, eq=False)
class LanguageArrays:
    """What a language replica computes on in a microbatch; all ``(b, S)``, packed ``(1, T)``.

    Attributes:
        input_ids, labels, position_ids: int64. A label is the next token of the same sample.
        loss_mask: float32; 1 where the next token is learned.
        lengths: tokens of each sample, padding left out.
        padded: tokens of each sample in the packed sequence; None without packing.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray
    loss_mask: np.ndarray
    lengths: tuple[int, ...]
    padded: np.ndarray | None


def language_arrays(
    samples: Sequence[Tokens], multiple: int, packed: bool, padding: int
) -> LanguageArrays:
    """Put samples together.

    Args:
        samples: of the replica, in order; at least one.
        multiple: that a row, or a packed sample, is padded to.
        packed: end to end.
        padding: token that fills up; it is not learned.
    """
    rows = _rounded([len(ids) for ids, _ in samples], multiple)
    if not packed:
        rows = [max(rows)] * len(samples)
    made = [_row(*sample, length, padding) for sample, length in zip(samples, rows, strict=True)]
    join = (lambda each: np.concatenate(each)[None]) if packed else np.stack
    ids, labels, positions, mask = (join(each) for each in zip(*made, strict=True))
    lengths = tuple(len(ids) for ids, _ in samples)
    return LanguageArrays(ids, labels, positions, mask, lengths, np.array(rows) if packed else None)


def _rounded(lengths: Sequence[int], multiple: int) -> list[int]:
    return [-(-length // multiple) * multiple for length in lengths]


def _row(ids: np.ndarray, learned: np.ndarray, length: int, padding: int) -> tuple[np.ndarray, ...]:
    """A sample's input_ids, labels, position_ids and loss_mask, each ``(length,)``."""
    count = len(ids)
    whole = np.full(length + 1, padding, dtype=np.int64)
    whole[:count] = ids
    mask = np.zeros(length, dtype=np.float32)
    mask[: count - 1] = learned[1:]
    return whole[:-1], whole[1:], np.arange(length, dtype=np.int64), mask


def places(
    samples: Sequence[np.ndarray], token: int, multiple: int, packed: bool
) -> TokenRuns:
    """Return where a modality's token stands in a replica's batch, as it is put together.

    Args:
        samples: ids of each, in order.
        token: of the modality.
        multiple, packed: as of :func:`language_arrays`.
    """
    rows = _rounded([len(ids) for ids in samples], multiple)
    starts = np.cumsum([0, *rows]) if packed else np.arange(len(rows)) * max(rows)
    found = [np.flatnonzero(ids == token) + at for ids, at in zip(samples, starts, strict=False)]
    positions = np.concatenate(found)
    if packed:
        return TokenRuns.from_positions(positions, 1, int(starts[-1]), starts.tolist())
    return TokenRuns.from_positions(positions, len(rows), max(rows))
