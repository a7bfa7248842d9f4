# SPDX-License-Identifier: Apache-2.0
"""Which units of encoder inputs (pixels) each rank sends to whom, as a ``BalancePlan`` says.

Pure integers; :mod:`~megatron.core.models.mimo.comm.item_exchange` moves them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron.core.models.mimo.comm.plan.balance import BalancePlan
from megatron.core.models.mimo.comm.plan.routed_layout import ExchangeGroup
from megatron.core.models.mimo.comm.plan.token_runs import expand

# Units of all items of an exchange group; None is one each.
Units = Sequence[int] | np.ndarray | None


@dataclass(frozen=True, eq=False)
class ItemMoves:
    """One rank's part in moving items, in units; see :func:`plan_item_moves`.

    Attributes:
        send_index: int64 ``(brought,)``: which unit goes out at each place.
        send_splits, recv_splits: units to and from each rank of the group, int64 ``(group,)``.
        arrange: int64 ``(encoded,)``: which arrived unit is at each place of the result.
    """

    send_index: np.ndarray
    send_splits: np.ndarray
    recv_splits: np.ndarray
    arrange: np.ndarray

    @property
    def brought(self) -> int:
        """Units that the rank reads."""
        return self.send_index.size

    @property
    def encoded(self) -> int:
        """Units that the rank gets."""
        return self.arrange.size


def plan_item_moves(
    plan: BalancePlan, exchange: ExchangeGroup, rank: int, units_per_item: Units
) -> ItemMoves:
    """Return one rank's part of the exchange, in integers.

    Args:
        plan: of the exchange group.
        exchange: the group.
        rank: global rank.
        units_per_item: units of all items of the group along dim 0; ``None`` is one each.

    Raises:
        ValueError: ``units_per_item`` is not one number per item of the plan.
    """
    units = np.ones_like(plan.tokens) if units_per_item is None else np.asarray(units_per_item)
    if units.shape != plan.tokens.shape:
        raise ValueError(
            f"units_per_item has {units.size} numbers, the plan has {plan.tokens.size} items; give "
            "the units of all items of the exchange group"
        )
    me = exchange.index(rank)
    replica, copy = exchange.src_of[me], exchange.src_copy[me]
    peers = exchange.src_ranks[:, copy]
    brought = np.flatnonzero(plan.home == replica)
    encoded = np.flatnonzero(plan.replica == replica)
    receivers, senders = peers[plan.replica[brought]], peers[plan.home[encoded]]
    return ItemMoves(
        send_index=_unit_index(units[brought], np.argsort(receivers, kind="stable")),
        send_splits=_total(receivers, units[brought], exchange.size),
        recv_splits=_total(senders, units[encoded], exchange.size),
        arrange=_places_of(units[encoded], np.argsort(senders, kind="stable")),
    )


def _total(ranks: np.ndarray, units: np.ndarray, size: int) -> np.ndarray:
    return np.bincount(ranks, weights=units, minlength=size).astype(np.int64)


def _unit_index(units: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Units of items that stand one after another, in another order of the items."""
    starts = np.cumsum(units) - units
    return expand(np.stack([starts[order], units[order]], axis=1).astype(np.int64))


def _places_of(units: np.ndarray, order: np.ndarray) -> np.ndarray:
    """The reverse of :func:`_unit_index`."""
    index = _unit_index(units, order)
    places = np.empty_like(index)
    places[index] = np.arange(index.size)
    return places
