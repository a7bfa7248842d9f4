# SPDX-License-Identifier: Apache-2.0
"""Rows that a bridge moves: by formula for a whole search, from the route plan for one pair."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from megatron.core.hyper_comm_grid import GridShape
from megatron.core.models.mimo.comm.plan.gather_layout import BridgeDirection
from megatron.core.models.mimo.comm.plan.routed_layout import RouteLayout
from megatron.core.models.mimo.comm.plan.routes import GroupRoutes
from megatron.core.models.mimo.comm.plan.token_runs import (
    TokenRuns,
    rows_of_parts,
    split_items,
)
from megatron.core.models.mimo.plan.shapes import EncoderShape, Work
from mimo_colocated.launch.layouts import Layout


@dataclass(frozen=True)
class Rows:
    """Rows that come to one rank over the wire, in either direction."""

    forward: Fraction
    backward: Fraction

    def __mul__(self, factor: int) -> Rows:
        return Rows(self.forward * factor, self.backward * factor)


def direction(encoder: Layout, language: Layout) -> tuple[BridgeDirection, int]:
    """Return which side has more replicas, and how many times as many.

    Raises:
        ValueError: neither number divides the other.
    """
    low, high = sorted((encoder.dp, language.dp))
    if high % low:
        raise ValueError(
            f"dp={encoder.dp} of the encoder and dp={language.dp} of the language model do not "
            "divide; take a multiple"
        )
    if low == high:
        return BridgeDirection.EQUAL, 1
    fan_in = encoder.dp > language.dp
    return BridgeDirection.FAN_IN if fan_in else BridgeDirection.FAN_OUT, high // low


def gather_rows(way: BridgeDirection, scale: int, cp: int) -> Rows:
    """Return what the gather bridge brings to a rank, in units of a language replica's rows.

    An all-gather of ``n`` blocks brings ``n - 1`` of them to each rank, an all-reduce of ``x``
    rows among ``n`` ranks ``2 (1 - 1/n) x``. For scale ``s`` and the language model's CP ``c``:

    | | forward | backward |
    |---|---|---|
    | fan-in | 1 - 1/s | 2 (1 - 1/c) |
    | equal | 0 | 2 (1 - 1/c) |
    | fan-out | 0 | 2 (1 - 1/c) + s - 1 |

    >>> gather_rows(BridgeDirection.FAN_IN, 4, 4)
    Rows(forward=Fraction(3, 4), backward=Fraction(3, 2))
    """
    summed = 2 * (1 - Fraction(1, cp))
    return {
        BridgeDirection.FAN_IN: Rows(1 - Fraction(1, scale), summed),
        BridgeDirection.EQUAL: Rows(Fraction(0), summed),
        BridgeDirection.FAN_OUT: Rows(Fraction(0), summed + scale - 1),
    }[way]


def routed_rows(way: BridgeDirection, scale: int, cp: int, source_cp: int = 1) -> Rows:
    """Return what the routed bridge brings to a rank: what it needs and does not have.

    | | forward | backward |
    |---|---|---|
    | fan-in | (1 - 1/s) / c | (1 - 1/c) / s |
    | equal | 0 | 1 - 1/c |
    | fan-out | 0 | s - 1/c |

    With ``e`` CP ranks of the encoder, fan-in and equal are fan-in of ``s e``; fan-out brings
    ``(1 - 1/e) / c`` forward and ``(s - 1/c) / e`` backward. Tokens of the modality lie evenly in
    the sequence, and so do the parts of items.

    Args:
        way, scale, cp: as of :func:`gather_rows`.
        source_cp: CP ranks of the encoder, which have a part of each item.

    >>> routed_rows(BridgeDirection.FAN_IN, 4, 4)
    Rows(forward=Fraction(3, 16), backward=Fraction(3, 16))
    """
    if way is BridgeDirection.FAN_OUT:
        lacked = 1 - Fraction(1, source_cp)
        return Rows(lacked / cp, (scale - Fraction(1, cp)) / source_cp)
    holders = scale * source_cp
    return Rows((1 - Fraction(1, holders)) / cp, (1 - Fraction(1, cp)) / holders)


@dataclass(frozen=True)
class Traffic:
    """What one microbatch of one encoder moves over its bridge.

    Attributes:
        forward, backward: the most rows that a rank receives.
        total: rows that all ranks receive, in both directions.
        sent: the most rows that a rank sends in one direction.
        own: the most rows that a rank's language model gets.
        group: ranks that exchange rows.
    """

    forward: int
    backward: int
    total: int
    sent: int
    own: int
    group: int


def planned_traffic(
    encoder: Layout, language: Layout, samples: int, shape: EncoderShape, items: int, work: Work
) -> Traffic:
    """Return what the objects that the bridge executes will move.

    Items lie evenly in a sample, the text between them, and the replicas of an encoder share out
    the items of an exchange group in their order.

    Args:
        encoder, language: the layouts.
        samples: of one language replica in one microbatch.
        shape: the encoder.
        items: of a sample.
        work: the step.
    """
    names = ("tp", "cp", "dp", "pp")
    source, destination = (
        GridShape((at.tp, at.cp, at.dp, at.pp), names) for at in (encoder, language)
    )
    layout = RouteLayout.from_grids(source, destination, sequence_parallel=True)
    # All groups are alike: the first one tells of the others.
    group = layout.group_of(0)
    tokens = _tokens(samples, work.sequence, items, shape.rows)
    replicas = group.dest_dps.size
    shared = split_items(items * samples * replicas, group.src_dps.size)
    held = rows_of_parts([[shape.rows] * len(each) for each in shared], encoder.cp)
    routes = GroupRoutes(group, [tokens] * replicas, held)
    forward = backward = sent = own = total = 0
    for rank in group.ranks.tolist():
        plan = routes.plan(rank)
        legs = (plan.forward, plan.backward)
        forward = max(forward, legs[0].received)
        backward = max(backward, legs[1].received)
        sent = max(sent, *(leg.sent for leg in legs))
        own = max(own, plan.own)
        total += sum(leg.received for leg in legs)
    return Traffic(forward, backward, total * layout.group_count, sent, own, group.size)


def gathered_traffic(
    encoder: Layout, language: Layout, samples: int, shape: EncoderShape, items: int
) -> Traffic:
    """Return what the gather bridge moves, by :func:`gather_rows`; rings send what they receive.

    Arguments as of :func:`planned_traffic`.

    Raises:
        ValueError: neither number of replicas divides the other.
    """
    way, scale = direction(encoder, language)
    own = samples * items * shape.rows
    rows = gather_rows(way, scale, language.cp) * own
    forward, backward = (math.ceil(each) for each in (rows.forward, rows.backward))
    total = math.ceil((rows.forward + rows.backward) * (language.size // language.pp))
    return Traffic(forward, backward, total, max(forward, backward), own, scale)


def _tokens(samples: int, sequence: int, items: int, rows: int) -> TokenRuns:
    """Places of items that lie evenly in each sample."""
    free = sequence - items * rows
    starts = [free * (n + 1) // (items + 1) + n * rows for n in range(items)]
    runs = [(b * sequence + s, rows) for b, s in itertools.product(range(samples), starts)]
    return TokenRuns(samples, sequence, np.array(runs, dtype=np.int64).reshape(-1, 2))
