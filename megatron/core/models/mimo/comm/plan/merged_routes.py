# SPDX-License-Identifier: Apache-2.0
"""Routes of several microbatches as one exchange, in integers. No torch, no process group.

What a rank sends to another one is put together microbatch by microbatch, on both sides in the
same order, so the members' merged plans match whenever their plans do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron.core.models.mimo.comm.plan.routes import Leg, RoutePlan


@dataclass(frozen=True, eq=False)
class MergedPlan:
    """One rank's part in moving the rows of several microbatches together.

    Held rows are those of the first microbatch, then those of the next, and so on. Own rows come
    in the order of :class:`.RoutePlan`: first what the rank holds itself, then what it receives.

    Attributes:
        held, local_index, forward, backward, backward_index: as of :class:`.RoutePlan`.
        own_index: for each microbatch, which of the own rows are its own: int64, in the order of
            its plan's ``place``.
    """

    held: int
    local_index: np.ndarray
    forward: Leg
    backward: Leg
    backward_index: np.ndarray
    own_index: tuple[np.ndarray, ...]

    @classmethod
    def of(cls, plans: Sequence[RoutePlan]) -> MergedPlan:
        """Merge one rank's plans; every rank of the exchange group merges those of the same
        microbatches in the same order.

        Raises:
            ValueError: there is none, or they are of different ranks or exchange groups.
        """
        _refuse_others(plans)
        held = _starts([plan.held for plan in plans])
        local = [plan.local_index + at for plan, at in zip(plans, held, strict=True)]
        own_index, first_local = [], _starts([plan.local_index.size for plan in plans])
        senders = [_repeat(plan.forward.recv_splits) for plan in plans]
        arrivals = _places_of_arrivals(senders, sum(index.size for index in local))
        for plan, first, arrived in zip(plans, first_local, arrivals, strict=True):
            own_index.append(np.concatenate([first + np.arange(plan.local_index.size), arrived]))
        gradients = [p.backward_index + at for p, at in zip(plans, held, strict=True)]
        returning = np.concatenate([_repeat(plan.backward.recv_splits) for plan in plans])
        return cls(
            held=sum(plan.held for plan in plans),
            local_index=np.concatenate(local),
            forward=_merge_legs(
                [plan.forward for plan in plans],
                [p.forward.send_index + at for p, at in zip(plans, held, strict=True)],
            ),
            backward=_merge_legs(
                [plan.backward for plan in plans],
                [own[p.backward.send_index] for p, own in zip(plans, own_index, strict=True)],
            ),
            backward_index=np.concatenate(gradients)[np.argsort(returning, kind="stable")],
            own_index=tuple(own_index),
        )

    @property
    def own(self) -> int:
        """Rows that the rank gets."""
        return sum(index.size for index in self.own_index)

    @property
    def place(self) -> np.ndarray:
        """:attr:`own_index` of all microbatches, one after another."""
        return np.concatenate(self.own_index)


# What an exchange moves by.
Routes = RoutePlan | MergedPlan


def _refuse_others(plans: Sequence[RoutePlan]) -> None:
    if not plans:
        raise ValueError("There are no plans to merge; give those of one microbatch or more")
    for plan in plans[1:]:
        if plan.rank != plans[0].rank or not np.array_equal(plan.ranks, plans[0].ranks):
            raise ValueError(
                "Plans of one rank in one exchange group can be merged, got those of rank "
                f"{plans[0].rank} in {plans[0].ranks.tolist()} and of rank {plan.rank} in "
                f"{plan.ranks.tolist()}"
            )


def _starts(sizes: Sequence[int]) -> np.ndarray:
    ends = np.cumsum(np.asarray(sizes, dtype=np.int64))
    return ends - np.asarray(sizes, dtype=np.int64)


def _repeat(splits: np.ndarray) -> np.ndarray:
    """The peer of every row: ``[2, 0, 1]`` -> ``[0, 0, 2]``."""
    return np.repeat(np.arange(splits.size), splits)


def _places_of_arrivals(senders: list[np.ndarray], first: int) -> list[np.ndarray]:
    """Where each microbatch's received rows stand among all own rows; ``first`` precede them."""
    order = np.argsort(np.concatenate(senders), kind="stable")
    place = np.empty(order.size, dtype=np.int64)
    place[order] = first + np.arange(order.size)
    return np.split(place, np.cumsum([each.size for each in senders])[:-1])


def _merge_legs(legs: Sequence[Leg], rows: Sequence[np.ndarray]) -> Leg:
    receivers = np.concatenate([_repeat(leg.send_splits) for leg in legs])
    return Leg(
        send_index=np.concatenate(rows)[np.argsort(receivers, kind="stable")],
        send_splits=np.sum([leg.send_splits for leg in legs], axis=0),
        recv_splits=np.sum([leg.recv_splits for leg in legs], axis=0),
        moves=any(leg.moves for leg in legs),
    )
