# SPDX-License-Identifier: Apache-2.0
"""Rows that a rank receives: by formula for uniform tokens, by counting sets for any. Pure.

``N`` rows of a language replica, ``s`` the scale, ``c`` the language model's CP; ring collectives
as usual: an all-gather of ``n`` blocks brings ``n - 1`` of them to each rank, an all-reduce of
``x`` rows ``2 (1 - 1/n) x``.

| | gather, forward | backward | routed, forward | backward |
|---|---|---|---|---|
| fan-in | (1 - 1/s) N | 2 (1 - 1/c) N | (1 - 1/s) N/c | (1 - 1/c) N/s |
| equal | 0 | 2 (1 - 1/c) N | 0 | (1 - 1/c) N |
| fan-out | 0 | 2 (1 - 1/c) N + (s - 1) N | 0 | (s - 1/c) N |
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from benchmarks.cases import Pair, TokenBatch
from megatron.core.models.mimo.comm.plan.gather_layout import BridgeDirection


@dataclass(frozen=True)
class Rows:
    """Rows that come to one rank over the wire, in either direction."""

    forward: Fraction
    backward: Fraction

    def __mul__(self, factor: int) -> Rows:
        return Rows(self.forward * factor, self.backward * factor)


def gather_rows(pair: Pair) -> Rows:
    """The gather bridge's, in units of ``N``.

    >>> gather_rows(Pair.parse("tp=1,dp=8/tp=1,cp=4,dp=2"))
    Rows(forward=Fraction(3, 4), backward=Fraction(3, 2))
    """
    s, c = pair.scale, pair.language.cp
    summed = 2 * (1 - Fraction(1, c))
    return {
        BridgeDirection.FAN_IN: Rows(1 - Fraction(1, s), summed),
        BridgeDirection.EQUAL: Rows(Fraction(0), summed),
        BridgeDirection.FAN_OUT: Rows(Fraction(0), summed + s - 1),
    }[pair.direction]


def routed_rows(pair: Pair) -> Rows:
    """The routed bridge's, in units of ``N``: what the rank needs and does not have.

    >>> routed_rows(Pair.parse("tp=1,dp=8/tp=1,cp=4,dp=2"))
    Rows(forward=Fraction(3, 16), backward=Fraction(3, 16))
    """
    s, c = pair.scale, pair.language.cp
    kept = 1 - Fraction(1, c)
    return {
        BridgeDirection.FAN_IN: Rows((1 - Fraction(1, s)) / c, kept / s),
        BridgeDirection.EQUAL: Rows(Fraction(0), kept),
        BridgeDirection.FAN_OUT: Rows(Fraction(0), s - Fraction(1, c)),
    }[pair.direction]


def lower_bound(pair: Pair, batch: TokenBatch, rank: int) -> Rows:
    """Rows that must come to a rank, whatever the bridge: owned ones that it does not hold.

    Backward: gradients of held rows that it does not own. Counted from positions, without routes.
    """
    held, owned = batch.held_rows(pair, rank), batch.owned_rows(pair, rank)
    both = np.intersect1d(held, owned, assume_unique=True).size
    return Rows(Fraction(owned.size - both), Fraction(held.size - both))
