# SPDX-License-Identifier: Apache-2.0
"""Bridges with links that lose packets.

At the sender a message is all rows that a rank holds (backward: the gradients of all rows that it
owns, by place), before they are sent. Ranks that hold the same rows lose the same packets: the TP
ranks of an encoder replica, and the owners of one place. At the receiver, of the routed bridge
alone, it is all rows that come from other ranks in one exchange. Where nobody in an exchange group
sends, and in the directions in which a gather bridge only takes a part, nothing is lost.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron.core.models.mimo.comm.exchange import Flight, PlanTensors, to_device
from megatron.core.models.mimo.comm.gather_bridge import ColocatedBridgeCommunicator
from megatron.core.models.mimo.comm.plan.merged_routes import MergedPlan, Routes
from megatron.core.models.mimo.comm.plan.routes import RoutePlan
from megatron.core.models.mimo.comm.routed_bridge import RoutedBridge
from megatron.core.models.mimo.lossy.collectives import Function, apply, identity
from megatron.core.models.mimo.lossy.layers import Remove, Where
from megatron.core.models.mimo.lossy.place import Place
from megatron.core.models.mimo.lossy.spec import BACKWARD, EXCHANGE, FORWARD

_THERE, _BACK = (FORWARD, EXCHANGE), (BACKWARD, EXCHANGE)


def places_of_bridge(bridge: Any) -> list[Where]:
    """Return (direction, collective) of what a bridge sends."""
    if isinstance(bridge, RoutedBridge):
        return [_THERE, _BACK]
    if not isinstance(bridge, ColocatedBridgeCommunicator):
        return []
    returns = bridge.is_fan_out() or bridge.dest_cp_pg is not None
    return [_THERE] * bridge.is_fan_in() + [_BACK] * returns


def check_bridge(name: str, bridge: Any, at_receiver: bool) -> None:
    """Refuse a bridge whose messages cannot be told apart.

    Raises:
        ValueError: packets are to be lost at the receiver of a gather bridge; it has lossy links.
    """
    if at_receiver and not isinstance(bridge, RoutedBridge):
        raise ValueError(
            f"{name} is a gather bridge, which loses packets at the sender only; give "
            "side='sender', or build the model with bridge='routed'"
        )
    if {"issue", "communicate"} & vars(bridge).keys():
        raise ValueError(f"{name} has lossy links already; remove() the first ones")


def holder(grid: Any, sequence_parallel: bool) -> str:
    """Return what ranks share that hold the same rows: their coordinates without TP.

    Args:
        grid: a module's.
        sequence_parallel: its TP ranks hold different rows.
    """
    coords = grid.coords(dist.get_rank())
    return " ".join(f"{dim} {i}" for dim, i in coords.items() if dim != "tp" or sequence_parallel)


def change_bridge(bridge: Any, places: dict[Where, Place]) -> Remove:
    """Make a bridge send over the links of its places; returns what undoes it."""
    there, back = places.get(_THERE), places.get(_BACK)
    if isinstance(bridge, RoutedBridge):
        return _change_routed(bridge, there, back)
    stock, send, send_back = bridge.communicate, _sends(there), _sends(back)

    def communicate(tensor: torch.Tensor) -> torch.Tensor:
        return apply(stock(apply(tensor, send, identity)), identity, send_back)

    bridge.communicate = communicate
    return partial(delattr, bridge, "communicate")


def _change_routed(bridge: Any, there: Place | None, back: Place | None) -> Remove:
    """Rows are lost before they leave, or among those that arrive."""
    stock_issue, stock_merge = bridge.issue, bridge.merge
    parts: weakref.WeakKeyDictionary[Routes, tuple[RoutePlan, ...]] = weakref.WeakKeyDictionary()

    def merge(plans: Sequence[RoutePlan]) -> MergedPlan:
        merged = stock_merge(plans)
        parts[merged] = tuple(plans)
        return merged

    def issue(rows: torch.Tensor, plan: Routes) -> Flight:
        tensors: PlanTensors = bridge.tensors(plan, rows.device)
        forth = there if tensors.forward is not None else None
        home = back if tensors.backward is not None else None
        flight = stock_issue(apply(rows, _sends(forth), _receives_back(home, tensors)), plan)
        arrive = flight.arrive
        send_back = partial(_in_order, _sends(home), _order(plan, parts.get(plan)))
        flight.arrive = lambda: apply(arrive(), _receives(forth, tensors), send_back)
        return flight

    bridge.issue, bridge.merge = issue, merge

    def undo() -> None:
        del bridge.issue, bridge.merge

    return undo


def _sends(place: Place | None) -> Function:
    return identity if place is None or place.at_receiver else partial(place.carry, peer=None)


def _order(plan: Any, parts: tuple[RoutePlan, ...] | None) -> np.ndarray:
    """The own rows by microbatch and place: how they arrive differs between owners of one place."""
    if parts is None:
        return np.argsort(plan.place, kind="stable")
    orders = [np.argsort(part.place, kind="stable") for part in parts]
    return np.concatenate(
        [index[order] for index, order in zip(plan.own_index, orders, strict=True)]
    )


def _in_order(send: Function, order: np.ndarray, gradients: torch.Tensor) -> torch.Tensor:
    """Send gradients of own rows in the order of their places."""
    if send is identity:
        return gradients
    (index,) = to_device([order], gradients.device)
    sent = gradients.index_select(0, index)
    left = send(sent)
    return gradients if left is sent else gradients.index_copy(0, index, left)


def _receives(place: Place | None, plan: PlanTensors) -> Function:
    """Own rows: the first ones were here, the others have arrived."""
    if place is None or not place.at_receiver:
        return identity
    carry = partial(place.carry, peer=None)

    def arrived(rows: torch.Tensor) -> torch.Tensor:
        sent = rows[plan.local :]
        left = carry(sent)
        return rows if left is sent else torch.cat([rows[: plan.local], left])

    return arrived


def _receives_back(place: Place | None, plan: PlanTensors) -> Function:
    """Gradients of held rows: those at ``backward_index`` have arrived."""
    if place is None or not place.at_receiver:
        return identity
    carry = partial(place.carry, peer=None)

    def arrived(gradients: torch.Tensor) -> torch.Tensor:
        sent = gradients.index_select(0, plan.backward_index)
        left = carry(sent)
        return gradients if left is sent else gradients.index_copy(0, plan.backward_index, left)

    return arrived
