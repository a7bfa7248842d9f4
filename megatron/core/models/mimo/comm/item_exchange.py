# SPDX-License-Identifier: Apache-2.0
"""Encoder inputs (pixels) go to the replicas that encode them, once, as a ``BalancePlan`` says.

A tensor of inputs has some *units* per item along dim 0: one image each, or as many patches as
the item has. TP ranks of a replica have equal inputs, so each rank exchanges with the ranks of
its own TP index only. Pixels need no gradient, so there is no backward.

Every rank of the exchange group calls, with zero units if it reads nothing. Before units move,
the ranks compare what they are about to do (:meth:`ItemExchange.confirm`).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron.core.models.mimo.comm.exchange import to_device
from megatron.core.models.mimo.comm.plan.balance import BalancePlan, EncoderBalance, plan_balance
from megatron.core.models.mimo.comm.plan.item_moves import ItemMoves, Units, plan_item_moves
from megatron.core.models.mimo.comm.routed_bridge import GUARDS, RoutedBridge

# Moves, and their (send index, arrange) on a device.
_Prepared = tuple[ItemMoves, Sequence[Any]]

MESSAGE_BYTES = 512
# Of the two texts in it, as JSON; the rest takes about 150.
_TEXT_BYTES = 170


def _key(kind: Units, device: torch.device) -> tuple[bytes | None, torch.device]:
    return None if kind is None else np.asarray(kind, dtype=np.int64).tobytes(), device


def _brief(text: str) -> str:
    """A text as it is, or its beginning and its digest where it is long for the message.

    JSON takes six bytes for a character beyond ASCII, and two for a quote.
    """
    if len(json.dumps(text)) <= _TEXT_BYTES:
        return text
    kept = text[:_TEXT_BYTES]
    while len(json.dumps(kept)) > _TEXT_BYTES - 20:
        kept = kept[:-1]
    digest = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    return f"{kept}... {digest}"


class ItemExchange:
    """Plans and moves the items of a routed bridge; all ranks of an exchange group call alike.

    Args:
        bridge: on whose process groups the items travel.
        balance: threshold and cost model.
        guard: compare plan, dtype and item shape before units move: ``"always"``, the
            ``"first"`` time, or ``"off"``. One all-gather of 512 bytes per rank on the host.

    Raises:
        ValueError: unknown ``guard``; a rank that is not on the bridge; CP in the encoder's grid.
    """

    def __init__(
        self, bridge: RoutedBridge, balance: EncoderBalance | None = None, *, guard: str = "always"
    ) -> None:
        if guard not in GUARDS:
            raise ValueError(f"guard must be one of {GUARDS}, got {guard!r}")
        self.rank, self.name = bridge.current_rank, bridge.layout.src_name
        cp = bridge.layout.src_cp_size
        if cp > 1:
            raise ValueError(
                f"Items of {self.name} do not move between replicas whose cp={cp} ranks encode a "
                "part of each; leave the balance out, or give those ranks to dp"
            )
        self.exchange = bridge.layout.group_of(self.rank)
        self.group, self.control = bridge.group, bridge.control
        self.balance, self.guard = balance or EncoderBalance(), guard
        self._confirmed = False
        # Moves and their indices on the device, of one plan at a time.
        self._prepared: tuple[Any, dict[Any, _Prepared]] = (None, {})

    def plan(self, tokens_of_my_items: Sequence[int]) -> BalancePlan:
        """Plan from what each rank reads itself; two small all-gathers on the host.

        Where the loader knows all items of the group, ``plan_balance`` needs no communication.

        Args:
            tokens_of_my_items: rows that each item becomes that this rank reads, in order.

        Raises:
            ValueError: the same on every rank: TP ranks of a replica read different items.
        """
        mine = np.asarray(tokens_of_my_items, dtype=np.int64).reshape(-1)
        counts = self._gather(np.array([mine.size]))[:, 0]
        padded = np.full(int(counts.max()), -1, dtype=np.int64)
        padded[: mine.size] = mine
        table = self._gather(padded)
        first = self.exchange.src_ranks[:, 0]
        for places in self.exchange.src_ranks:
            apart = [p for p in places if not np.array_equal(table[p], table[places[0]])]
            if apart:
                raise ValueError(
                    f"Ranks {self.exchange.ranks[apart].tolist()} read {self.name} of other "
                    f"tokens than rank {self.exchange.ranks[places[0]]}, of the same encoder "
                    "replica; give all TP ranks of a replica the same encoder inputs"
                )
        tokens = [table[place, : counts[place]] for place in first]
        return plan_balance(np.concatenate(tokens), counts[first], self.balance)

    def prepare(self, plan: BalancePlan, device: torch.device, kinds: Sequence[Units]) -> None:
        """Upload what moves of a plan need, all in one copy that nobody waits for.

        Moves of other kinds, or on other devices, upload their own.

        Args:
            plan: the object that is then given to :meth:`move`.
            device: of the units.
            kinds: ``units_per_item`` of the moves.
        """
        moves = [plan_item_moves(plan, self.exchange, self.rank, each) for each in kinds]
        arrays = [array for each in moves for array in (each.send_index, each.arrange)]
        indices = to_device(arrays, device) if plan.moves and arrays else arrays
        known = self._prepared[1] if self._prepared[0] is plan else {}
        for number, each in enumerate(moves):
            known[_key(kinds[number], device)] = each, indices[2 * number : 2 * number + 2]
        self._prepared = plan, known

    def _moves(self, plan: BalancePlan, kind: Units, device: torch.device) -> _Prepared:
        if self._prepared[0] is not plan or _key(kind, device) not in self._prepared[1]:
            self.prepare(plan, device, [kind])
        return self._prepared[1][_key(kind, device)]

    def move(
        self,
        units: torch.Tensor,
        plan: BalancePlan,
        units_per_item: Units = None,
    ) -> torch.Tensor:
        """Send the units that this rank reads; return those that it encodes, by ascending item.

        Args:
            units: ``(brought, ...)``; without items ``(0, ...)`` of the same shape and dtype.
            plan: the same on all ranks.
            units_per_item: as for :func:`plan_item_moves`.

        Raises:
            ValueError: the same on every rank of the group, naming ranks and field: what they
                bring does not fit their plan, or plan, dtype or shape differ. Without a
                comparison a rank that brings what does not fit raises alone.
        """
        moves, indices = self._moves(plan, units_per_item, units.device)
        problem = ""
        if units.size(0) != moves.brought:
            problem = f"brings {units.size(0)} units of {self.name}, planned are {moves.brought}"
        self.confirm(units, plan, units_per_item, problem)
        if not plan.moves or self.group is None:
            return units
        shape, width = units.shape[1:], math.prod(units.shape[1:]) * units.element_size()
        # As bytes: backends do not move every dtype.
        send_index, arrange = indices
        sent = units.detach().index_select(0, send_index).reshape(-1).view(torch.uint8)
        arrived = sent.new_empty(moves.encoded * width)
        dist.all_to_all_single(
            arrived,
            sent,
            output_split_sizes=(moves.recv_splits * width).tolist(),
            input_split_sizes=(moves.send_splits * width).tolist(),
            group=self.group,
        )
        return arrived.view(units.dtype).reshape(moves.encoded, *shape).index_select(0, arrange)

    def confirm(
        self,
        units: torch.Tensor,
        plan: BalancePlan,
        units_per_item: Units = None,
        problem: str = "",
    ) -> None:
        """Compare what the group is about to move, if ``guard`` says so; see :meth:`move`."""
        due = self.guard == "always" or (self.guard == "first" and not self._confirmed)
        self._confirmed = True
        if not due or self.control is None:
            if problem:
                raise ValueError(f"Rank {self.rank} {problem}")
            return
        told = np.asarray([] if units_per_item is None else units_per_item, dtype="<i8")
        mine = {
            "problem": _brief(problem),
            "plan": f"{plan.digest() & 0xFFFF_FFFF_FFFF_FFFF:016x}",
            "units per item": hashlib.blake2b(told.tobytes(), digest_size=8).hexdigest(),
            "dtype": str(units.dtype),
            "item shape": _brief(str(tuple(units.shape[1:]))),
        }
        self._compare(mine)

    def _compare(self, mine: dict[str, str]) -> None:
        text = json.dumps(mine).encode()
        message = np.frombuffer(text.ljust(MESSAGE_BYTES), dtype=np.int64)
        told = [json.loads(row.tobytes()) for row in self._gather(message)]
        ranks = self.exchange.ranks.tolist()
        problems = [(r, t["problem"]) for r, t in zip(ranks, told, strict=True) if t["problem"]]
        if problems:
            raise ValueError("; ".join(f"Rank {rank} {problem}" for rank, problem in problems))
        for field in mine:
            values: dict[str, list[int]] = {}
            for rank, each in zip(ranks, told, strict=True):
                values.setdefault(each[field], []).append(rank)
            if len(values) > 1:
                parts = ", ".join(f"{value} on ranks {r}" for value, r in values.items())
                raise ValueError(
                    f"Balancing {self.name}: {field} differs: {parts}. All ranks of the exchange "
                    "group plan from the same items and bring inputs of one dtype and shape; a "
                    "rank without items brings an empty tensor of that shape."
                )

    def _gather(self, numbers: np.ndarray) -> np.ndarray:
        """Integers of all ranks: int64 ``(n,)`` -> ``(group, n)``."""
        if self.control is None or not numbers.size:
            return np.repeat(numbers[None], self.exchange.size, axis=0)
        mine = torch.from_numpy(numbers.copy())
        every = mine.new_empty(self.exchange.size * mine.numel())
        dist.all_gather_into_tensor(every, mine, group=self.control)
        return every.numpy().reshape(self.exchange.size, -1)
