# SPDX-License-Identifier: Apache-2.0
"""What a link has carried and lost, counted on the host."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np


@dataclass
class Counts:
    """What was sent over a link; all are numbers of something.

    Attributes:
        messages: tensors; those of recomputed layers are ``repeated`` instead, and in nothing else.
        packets: sent once each.
        payload_bytes: of these.
        lost: of these packets.
        bursts: runs of packets that were lost one after another, over messages.
        in_bad: packets sent while the chain was in bad.
        resent: packets sent again, counted as often as they were.
        rounds: waits for packets that were sent again.
        repeated: messages that a recomputed layer sent a second time.
    """

    messages: int = 0
    packets: int = 0
    payload_bytes: int = 0
    lost: int = 0
    bursts: int = 0
    in_bad: int = 0
    resent: int = 0
    rounds: int = 0
    repeated: int = 0

    def add(self, lost: np.ndarray, bad: np.ndarray, payload_bytes: int, in_burst: bool) -> None:
        """Count a message.

        Args:
            lost, bad: ``(packets,)`` bool.
            payload_bytes: of the message.
            in_burst: the packet before was lost.
        """
        self.messages += 1
        self.packets += lost.size
        self.payload_bytes += payload_bytes
        self.lost += int(lost.sum())
        self.bursts += int((lost & ~np.concatenate([[in_burst], lost[:-1]])).sum())
        self.in_bad += int(bad.sum())

    def plus(self, other: Counts) -> Counts:
        """Return the sum of two."""
        names = [field.name for field in fields(self)]
        return Counts(**{name: getattr(self, name) + getattr(other, name) for name in names})

    def row(self) -> dict[str, Any]:
        """Return the counts, and ``loss_rate``, ``mean_burst`` and ``bad_share``.

        A share of nothing is None. JSON can hold the row.
        """
        return {
            **asdict(self),
            "loss_rate": _share(self.lost, self.packets),
            "mean_burst": _share(self.lost, self.bursts),
            "bad_share": _share(self.in_bad, self.packets),
        }


def sum_counts(rows: Iterable[dict[str, Any]], by: Sequence[str]) -> list[dict[str, Any]]:
    """Return rows summed over what ``by`` does not name, in the order of first appearance.

    Args:
        rows: with the counts of :class:`Counts` and the columns in ``by``.
        by: columns that keep rows apart, e.g. ``("place", "direction")``; none gives one row.

    Raises:
        ValueError: a row lacks a column.
    """
    names = [field.name for field in fields(Counts)]
    totals: dict[tuple[Any, ...], Counts] = {}
    for row in rows:
        missing = [name for name in (*by, *names) if name not in row]
        if missing:
            raise ValueError(f"a row has no column {missing[0]!r}; it has {sorted(row)}")
        key = tuple(row[name] for name in by)
        counts = Counts(**{name: row[name] for name in names})
        totals[key] = totals.get(key, Counts()).plus(counts)
    return [
        {**dict(zip(by, key, strict=True)), **counts.row()} for key, counts in totals.items()
    ]


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
