# SPDX-License-Identifier: Apache-2.0
"""Arrays of one replica's samples: rows of one length, or all end to end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron.core.models.mimo.comm.plan.token_runs import TokenRuns
from megatron.core.models.mimo.data.batches import Cut, padded

Tokens = tuple[np.ndarray, np.ndarray]
"""A sample's ids, and which of them are learned."""
Positions = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""From a sample's ids, padding included, and its items' grids to positions int64 ``(k, n)``."""


def count_up(ids: np.ndarray, _grids: np.ndarray) -> np.ndarray:
    """Return the positions of text: int64 ``(1, n)``."""
    return np.arange(len(ids), dtype=np.int64)[None]


@dataclass(frozen=True, eq=False)
class LanguageArrays:
    """What a language replica computes on in a microbatch; all ``(b, S)``, packed ``(1, T)``.

    Attributes:
        input_ids, labels: int64. A label is the next token of the same sample.
        position_ids: int64, or ``(3, b, S)`` where images have rows and columns.
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
    samples: Sequence[Tokens],
    grids: Sequence[np.ndarray],
    cut: Cut,
    padding: int,
    positions: Positions,
) -> LanguageArrays:
    """Put samples together.

    Args:
        samples: of the replica, in order; at least one.
        grids: of the items of each.
        cut: says how samples lie and what they are padded to.
        padding: token that fills up; it is not learned.
        positions: of a sample's tokens.
    """
    rows = padded([len(ids) for ids, _ in samples], cut.multiple)
    if not cut.packed:
        rows = [max(rows)] * len(samples)
    made = [_row(*sample, length, padding) for sample, length in zip(samples, rows, strict=True)]
    places = [positions(ids, own) for (ids, _, _), own in zip(made, grids, strict=True)]
    ids, labels, mask = (_joined(each, cut.packed) for each in zip(*made, strict=True))
    axes = [_joined(each, cut.packed) for each in zip(*places, strict=True)]
    return LanguageArrays(
        ids,
        labels,
        axes[0] if len(axes) == 1 else np.stack(axes),
        mask,
        lengths=tuple(len(ids) for ids, _ in samples),
        padded=np.array(rows) if cut.packed else None,
    )


def _joined(each: Sequence[np.ndarray], packed: bool) -> np.ndarray:
    return np.concatenate(each)[None] if packed else np.stack(each)


def _row(ids: np.ndarray, learned: np.ndarray, length: int, padding: int) -> tuple[np.ndarray, ...]:
    """A sample's input_ids, labels and loss_mask, each ``(length,)``."""
    count = len(ids)
    whole = np.full(length + 1, padding, dtype=np.int64)
    whole[:count] = ids
    mask = np.zeros(length, dtype=np.float32)
    mask[: count - 1] = learned[1:]
    return whole[:-1], whole[1:], mask


def places(
    samples: Sequence[np.ndarray], token: int, multiple: int, packed: bool
) -> TokenRuns:
    """Return where a modality's token stands in a replica's batch, as it is put together.

    Args:
        samples: ids of each, in order.
        token: of the modality.
        multiple, packed: of the cut.
    """
    rows = padded([len(ids) for ids in samples], multiple)
    starts = np.cumsum([0, *rows]) if packed else np.arange(len(rows)) * max(rows)
    found = [np.flatnonzero(ids == token) + at for ids, at in zip(samples, starts, strict=False)]
    positions = np.concatenate(found)
    if packed:
        return TokenRuns.from_positions(positions, 1, int(starts[-1]), starts.tolist())
    return TokenRuns.from_positions(positions, len(rows), max(rows))
