# SPDX-License-Identifier: Apache-2.0
"""Rows that a rank receives: by formula for uniform tokens, by counting sets for any. Pure.

``N`` rows of a language replica; the formulas are those that layouts are planned by.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from benchmarks.cases import Pair, TokenBatch
from megatron.core.models.mimo.plan import bridge
from megatron.core.models.mimo.plan.bridge import Rows


def gather_rows(pair: Pair) -> Rows:
    """The gather bridge's, in units of ``N``.

    >>> gather_rows(Pair.parse("tp=1,dp=8/tp=1,cp=4,dp=2"))
    Rows(forward=Fraction(3, 4), backward=Fraction(3, 2))
    """
    return bridge.gather_rows(pair.direction, pair.scale, pair.language.cp)


def routed_rows(pair: Pair) -> Rows:
    """The routed bridge's, in units of ``N``: what the rank needs and does not have.

    >>> routed_rows(Pair.parse("tp=1,dp=8/tp=1,cp=4,dp=2"))
    Rows(forward=Fraction(3, 16), backward=Fraction(3, 16))
    """
    return bridge.routed_rows(pair.direction, pair.scale, pair.language.cp)


def lower_bound(pair: Pair, batch: TokenBatch, rank: int) -> Rows:
    """Rows that must come to a rank, whatever the bridge: owned ones that it does not hold.

    Backward: gradients of held rows that it does not own. Counted from positions, without routes.
    """
    held, owned = batch.held_rows(pair, rank), batch.owned_rows(pair, rank)
    both = np.intersect1d(held, owned, assume_unique=True).size
    return Rows(Fraction(owned.size - both), Fraction(held.size - both))
