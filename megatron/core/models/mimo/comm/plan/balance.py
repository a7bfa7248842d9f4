# SPDX-License-Identifier: Apache-2.0
"""Which encoder replica encodes which item (image), so that none waits long for the heaviest.

Items of one exchange group are numbered in global order: those that the group's first encoder
replica reads, then those of the next. Each replica's work is the sum of its items' costs; its
*spread* is the heaviest replica's work over the mean. Items are taken heaviest first and given to
the replica with the least work so far (longest processing time first), which ends within 4/3 of
the best there is. All ranks compute the same from the same integers: ties go to the lower index, so
nobody asks anybody.

Where rows go afterwards does not change: ``BalancePlan.held_rows`` says which rows a replica
holds now, and ``plan_routes`` sends them from there straight to the ranks that own their places.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron.core.models.mimo.comm.plan.token_runs import Runs, rows_of_items

# Tokens of each item, int64 (n,) -> its cost in any unit, (n,).
CostModel = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class TokenCost:
    """Cost of a transformer encoder on one item: ``tokens² + k · tokens``.

    Attributes:
        k: tokens at which attention scores cost as much as all that is linear in the tokens;
            about 6 × hidden size for the usual layer (24·t·h² against 4·t²·h operations).
    """

    k: int = 6144

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        """Costs of items, int64 ``(n,)`` -> int64 ``(n,)``."""
        return tokens * tokens + self.k * tokens


@dataclass(frozen=True)
class EncoderBalance:
    """When and by which cost to assign items to encoder replicas.

    Attributes:
        threshold: a spread up to this is left alone, since moving pixels costs time, too.
        cost: of items, from their numbers of tokens; the same on all ranks.
        tokens_per_item: of a modality's encoder inputs: the rows that each item becomes. Needed
            where :class:`MimoModel` balances, which knows inputs but not items.
        units_per_item: of the same: rows of each item along dim 0 of packed tensors (patches);
            ``None`` if tensors have one row per item.

    Raises:
        ValueError: a threshold below 1, which no spread can reach.
    """

    threshold: float = 1.1
    cost: CostModel = TokenCost()
    tokens_per_item: Callable[[Any], Sequence[int]] | None = None
    units_per_item: Callable[[Any], Sequence[int]] | None = None

    def __post_init__(self) -> None:
        if not self.threshold >= 1:
            raise ValueError(
                f"threshold must be at least 1 (equal work on all replicas), got {self.threshold}"
            )


@dataclass(frozen=True, eq=False)
class BalancePlan:
    """Who encodes what; the same on all ranks of an exchange group. See :func:`plan_balance`.

    Attributes:
        tokens: rows of each item, int64 ``(items,)``.
        home: replica that reads each item, ``(items,)``.
        replica: replica that encodes it, ``(items,)``.
        replicas: how many there are.
        before, after: spread with the items at home, and as assigned.
    """

    tokens: np.ndarray
    home: np.ndarray
    replica: np.ndarray
    replicas: int
    before: float
    after: float

    @property
    def moves(self) -> bool:
        """Whether any item is encoded away from home."""
        return bool((self.home != self.replica).any())

    @property
    def assignment(self) -> list[np.ndarray]:
        """Items that each replica encodes, in this order: ascending."""
        return [np.flatnonzero(self.replica == each) for each in range(self.replicas)]

    def held_rows(self) -> list[Runs]:
        """Return the rows of each replica's encoder output, the ``held`` of ``plan_routes``."""
        return rows_of_items(self.tokens, self.assignment)

    def digest(self) -> int:
        """Return what is equal on all ranks, or their exchange would not match; signed 64 bits."""
        table = np.stack([self.tokens, self.home, self.replica]).astype("<i8")
        state = hashlib.blake2b(table.tobytes(), digest_size=8, key=str(self.replicas).encode())
        return int.from_bytes(state.digest(), "little", signed=True)


def plan_balance(
    tokens_per_item: Sequence[int] | np.ndarray,
    items_per_replica: Sequence[int] | np.ndarray,
    balance: EncoderBalance | None = None,
) -> BalancePlan:
    """Assign the items of one exchange group to its encoder replicas.

    >>> linear = EncoderBalance(cost=lambda tokens: tokens)
    >>> plan = plan_balance([8, 4, 2, 2, 1, 1], [2, 2, 2], linear)
    >>> [items.tolist() for items in plan.assignment], plan.before, round(plan.after, 2)
    ([[0], [1, 4], [2, 3, 5]], 2.0, 1.33)

    Args:
        tokens_per_item: rows that each item becomes, of the whole group in global order.
        items_per_replica: items that each encoder replica of the group reads, by DP.
        balance: threshold and cost model.

    Returns:
        The plan; it moves nothing if the spread is at most the threshold or would not shrink.

    Raises:
        ValueError: the numbers of items do not match; a cost is negative or not a number.
    """
    balance = balance or EncoderBalance()
    tokens = np.asarray(tokens_per_item, dtype=np.int64).reshape(-1)
    counts = np.asarray(items_per_replica, dtype=np.int64).reshape(-1)
    if counts.sum() != tokens.size or (counts < 0).any() or not counts.size:
        raise ValueError(
            f"items_per_replica {counts.tolist()} sums to {counts.sum()}, but tokens_per_item has "
            f"{tokens.size} items; give both for all encoder replicas of the exchange group"
        )
    costs = _costs(balance.cost, tokens)
    home = np.repeat(np.arange(counts.size), counts)
    before = after = _spread(costs, home, counts.size)
    replica = home
    if before > balance.threshold:
        assigned = heaviest_first(costs, counts.size)
        balanced = _spread(costs, assigned, counts.size)
        if balanced < before:
            replica, after = assigned, balanced
    return BalancePlan(tokens, home, replica, counts.size, before, after)


def _costs(model: CostModel, tokens: np.ndarray) -> np.ndarray:
    costs = np.asarray(model(tokens))
    if costs.dtype.kind != "i":
        costs = costs.astype(np.float64)
    if costs.shape != tokens.shape:
        raise ValueError(
            f"The cost model returned shape {costs.shape} for {tokens.size} items; it takes the "
            "tokens of all items and returns one cost for each"
        )
    wrong = np.flatnonzero(~(np.isfinite(costs) & (costs >= 0)))
    if wrong.size:
        raise ValueError(
            f"The cost model returned {costs[wrong[0]]} for item {wrong[0]} of {tokens[wrong[0]]} "
            "tokens; costs are finite and not negative"
        )
    return costs


def heaviest_first(costs: np.ndarray, replicas: int) -> np.ndarray:
    """Return the replica of each item: the heaviest left goes to the least loaded, int64 ``(n,)``.

    Ties go to the lower index.

    Args:
        costs: of the items, ``(n,)``.
        replicas: how many there are.
    """
    loads = [(0, replica) for replica in range(replicas)]
    assigned = np.empty(costs.size, dtype=np.int64)
    values = costs.tolist()
    for item in np.argsort(-costs, kind="stable").tolist():
        load, replica = loads[0]
        assigned[item] = replica
        heapq.heapreplace(loads, (load + values[item], replica))
    return assigned


def _spread(costs: np.ndarray, replica: np.ndarray, replicas: int) -> float:
    """Heaviest work over mean work; 1 if there is none."""
    work = np.bincount(replica, weights=costs, minlength=replicas)
    total = float(work.sum())
    return float(work.max()) * replicas / total if total else 1.0
