# SPDX-License-Identifier: Apache-2.0
"""Which rows each rank sends to whom, forward and backward, in integers. No torch, no group.

Rows of one modality in one exchange group are numbered in reading order: all rows of the group's
first language replica, sample by sample, then those of the next. An encoder replica *holds* some
of them (all its TP ranks have copies); one that cuts its items over CP is several holders. Each
row has one *owner*, the language coordinate whose part of the sequence has the row's token;
without sequence parallelism the owner's TP ranks all need the row.

* forward: a rank that needs a row and holds it copies it. Else exactly one of the row's holders
  sends it.
* backward: a rank that holds a row and owns it keeps the gradient. Else exactly one of the
  owner's TP ranks sends it.

So each rank receives what it lacks and nothing else. Holders of one row take turns: the rows that
a replica has for an owner (a *cell*) are cut into one stretch per copy, turned by the receiver's
number so that remainders spread. All ranks compute the same, so nobody asks anybody.

A rank plans its own part only: time and memory are linear in the rows of its own replicas, and in
the runs (images) of its exchange group.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron.core.models.mimo.comm.plan.group_rows import GroupRows
from megatron.core.models.mimo.comm.plan.routed_layout import ExchangeGroup, RouteLayout
from megatron.core.models.mimo.comm.plan.token_runs import (
    Runs,
    TokenRuns,
    consecutive,
    count_mismatch,
)


class RowCountError(ValueError):
    """The encoders of an exchange group bring another number of rows than there are tokens.

    Attributes:
        tokens, rows: of the whole group.
    """

    def __init__(self, message: str, tokens: int, rows: int) -> None:
        super().__init__(message)
        self.tokens, self.rows = tokens, rows


@dataclass(frozen=True)
class PlanDigest:
    """What all ranks of an exchange group must have planned from, as one number per field.

    Attributes:
        layout: grids, sequence parallelism and members of the group.
        tokens: batch sizes, sequence lengths and token places of all its language replicas.
        held: which rows each of its encoder replicas holds, in which order.
    """

    layout: int
    tokens: int
    held: int


@dataclass(frozen=True, eq=False)
class Leg:
    """One direction of a rank's part in an exchange.

    Attributes:
        send_index: int64 ``(sent,)``, which of the rank's rows to send, by receiver.
        send_splits, recv_splits: rows to and from each rank of the group, int64 ``(group,)``.
        moves: whether any rank of the group sends; if not, nobody enters.
    """

    send_index: np.ndarray
    send_splits: np.ndarray
    recv_splits: np.ndarray
    moves: bool

    @property
    def sent(self) -> int:
        """Rows that this rank sends; a row to two ranks counts twice."""
        return self.send_index.size

    @property
    def received(self) -> int:
        """Rows that this rank receives."""
        return int(self.recv_splits.sum())


@dataclass(frozen=True, eq=False)
class RoutePlan:
    """One rank's part in moving one microbatch's rows of one modality; see :func:`plan_routes`.

    The rank's *own* rows are those that it needs, in the order in which they come: first the ones
    that it holds itself, then the received ones.

    Attributes:
        rank: the global rank that this is for.
        ranks: global ranks of its exchange group.
        group_rows: rows of the whole exchange group; with 0 there is nothing to do.
        held: rows that the rank's encoder brings.
        tokens: the token places of the rank's language replica.
        local_length: tokens ``S_local`` of the rank's part of a sequence.
        place: int64 ``(own,)``: where own rows go in the flattened ``(S_local * B)``.
        local_index: int64 ``(local,)``: held rows that are own rows.
        forward: held rows out, own rows in.
        backward: gradients of own rows out, of held rows in.
        backward_index: int64: held rows that the received gradients belong to.
        identity: digest of all that the group must agree on.
        later: the same rows' plans for each of the layout's later stages; each moves a part of
            every row.
    """

    rank: int
    ranks: np.ndarray
    group_rows: int
    held: int
    tokens: TokenRuns
    local_length: int
    place: np.ndarray
    local_index: np.ndarray
    forward: Leg
    backward: Leg
    backward_index: np.ndarray
    identity: PlanDigest
    later: tuple[RoutePlan, ...] = ()

    @property
    def own(self) -> int:
        """Rows that the rank gets."""
        return self.place.size

    def digest(self) -> PlanDigest:
        """Return what is equal on all ranks of the group, or their exchange would not match."""
        return self.identity


def plan_routes(
    layout: RouteLayout,
    rank: int,
    tokens: Sequence[TokenRuns],
    held: Sequence[int] | Sequence[Runs],
) -> RoutePlan:
    """Plan one rank's routes for one microbatch of one modality, from integers of the host.

    >>> from megatron.core.hyper_comm_grid import GridShape
    >>> src, dest = GridShape((1, 2), ("tp", "dp")), GridShape((1, 2, 1), ("tp", "cp", "dp"))
    >>> layout = RouteLayout.from_grids(src, dest)
    >>> tokens = TokenRuns.from_positions(np.array([0, 1, 2, 3]), batch=1, seq_len=8)
    >>> plan = plan_routes(layout, 1, [tokens], [2, 2])  # rank 1 holds rows 2 and 3, owns both
    >>> plan.place.tolist(), plan.forward.received, plan.backward.received
    ([0, 1], 0, 0)

    Args:
        layout: of the bridge.
        rank: global rank.
        tokens: the token places of every language replica of the rank's exchange group, by DP.
        held: the rows of every encoder replica of the group, by DP: their number, if the
            replicas hold consecutive rows, or their runs (:func:`.token_runs.rows_of_items`).
            With CP in the encoder's grid the runs of every CP rank of every replica
            (:func:`.token_runs.rows_of_parts`).

    Raises:
        RowCountError: the replicas hold another number of rows than there are tokens.
        ValueError: an entry per replica is missing; rows that are held twice or not at all; a
            sequence that cannot be cut; numbers of rows where encoders have CP.
    """
    return GroupRoutes(layout.group_of(rank), tokens, held).plan(rank)


class GroupRoutes:
    """The rows of one exchange group, from which each of its ranks can be planned.

    Args, raises: as :func:`plan_routes`.
    """

    def __init__(
        self,
        group: ExchangeGroup,
        tokens: Sequence[TokenRuns],
        held: Sequence[int] | Sequence[Runs],
    ) -> None:
        self.group, self.tokens = group, tuple(tokens)
        self.held = _as_runs(held, group.layout.src_cp_size)
        self.held_counts = [int(runs[:, 1].sum()) for runs in self.held]
        self.total = sum(each.count for each in self.tokens)
        self._check_counts()
        self._rows = GroupRows(group, self.tokens, self.held)
        self.digest = PlanDigest(
            layout=_digest(group.signature()),
            tokens=_digest(_token_arrays(self.tokens)),
            held=_digest(self.held),
        )
        self._later = [
            GroupRoutes(group.at_stage(stage), self.tokens, self.held)
            for stage in group.layout.later_stages
        ]

    def plan(self, rank: int) -> RoutePlan:
        """Return the part of one rank of the group.

        Raises:
            ValueError: the rank is not in the group.
        """
        return _RankRoutes(self, self._rows, rank).plan(
            tuple(routes.plan(rank) for routes in self._later)
        )

    # -- construction ----------------------------------------------------------------------

    def _check_counts(self) -> None:
        group, layout = self.group, self.group.layout
        holder = "replica" if layout.src_cp_size == 1 else "holder"
        for what, whose, given, wanted in (
            (f"token places of {layout.dest_name}", "replica", self.tokens, group.dest_dps.size),
            (f"held rows of {layout.src_name}", holder, self.held, group.holders),
        ):
            got = len(given)
            if got != wanted:
                raise ValueError(
                    f"An exchange group of {group.size} ranks needs the {what} of its {wanted} "
                    f"{whose}s, got {got}; give one entry per {whose}, in DP order"
                    + (" and within it in CP order" if whose == "holder" else "")
                )
        if self.total != sum(self.held_counts):
            rows = sum(self.held_counts)
            raise RowCountError(
                count_mismatch(layout.src_name, self.total, rows)
                + f" in the exchange group of {group.size} ranks that starts at rank "
                f"{group.ranks[0]}: tokens per {layout.dest_name} replica "
                f"{[each.count for each in self.tokens]}, rows per {layout.src_name} replica "
                f"{self.held_counts}; the sums must be equal",
                self.total,
                rows,
            )


class _RankRoutes:
    """One rank's part: of the rows that its encoder replica holds, and those that it owns."""

    def __init__(self, of_group: GroupRoutes, rows: GroupRows, rank: int) -> None:
        self.of_group, self.group, self.rank = of_group, of_group.group, rank
        self.me = me = self.group.index(rank)
        self.own_src, self.own_owner = int(self.group.src_of[me]), int(self.group.owner_of[me])
        found = rows.of(self.own_src, int(self.group.dest_of[me]), self.own_owner)
        self._src, self._at, self._owner, self._place = (
            found.src, found.at, found.owner, found.place,
        )  # fmt: skip
        self._in_cell, self._cell_size = found.in_cell, found.cell_size
        self._moves = rows.moves

    def plan(self, later: tuple[RoutePlan, ...]) -> RoutePlan:
        group, me, src, owner = self.group, self.me, self.own_src, self.own_owner
        # The rows are sorted by holder, so those of one holder are a stretch.
        held = np.arange(*np.searchsorted(self._src, [src, src + 1]))
        owned = np.flatnonzero(self._owner == owner)
        local = held[self._owner[held] == owner]
        lacked, lent = owned[self._src[owned] != src], held[self._owner[held] != owner]

        incoming = self._holder(lacked, me)
        arrival = np.argsort(incoming, kind="stable")
        own = np.concatenate([local, lacked[arrival]])
        number = np.empty(self._src.size, dtype=np.int64)
        number[own] = np.arange(own.size)
        rows, receivers = self._rows_to_send(held, me)
        forward = self._leg(self._at[rows], receivers, incoming, self._moves[0])

        incoming = self._gradient_holder(lent, me)
        rows, receivers = self._gradients_to_send(owned, me)
        backward = self._leg(number[rows], receivers, incoming, self._moves[1])
        tokens = self.of_group.tokens[group.dest_of[me]]
        cp_size, tp_size = group.sequence_parts
        return RoutePlan(
            rank=self.rank,
            ranks=group.ranks,
            group_rows=self.of_group.total,
            held=self.of_group.held_counts[src],
            tokens=tokens,
            local_length=tokens.seq_len // (cp_size * tp_size),
            place=self._place[own],
            local_index=self._at[local],
            forward=forward,
            backward=backward,
            backward_index=self._at[lent[np.argsort(incoming, kind="stable")]],
            identity=self.of_group.digest,
            later=later,
        )

    # -- who sends, seen from the receiver and from the sender: the same rule ------------------

    def _holder(self, rows: np.ndarray, me: int) -> np.ndarray:
        """Which rank sends each row that rank ``me`` lacks."""
        copies = self.group.layout.src_tp_size
        return self.group.src_ranks[self._src[rows], self._turn(rows, me, copies)]

    def _gradient_holder(self, rows: np.ndarray, me: int) -> np.ndarray:
        """Which rank sends the gradient of each row that rank ``me`` holds and does not own."""
        copies = self.group.copies
        return self.group.owner_ranks[self._owner[rows], self._turn(rows, me, copies)]

    def _rows_to_send(self, held: np.ndarray, me: int) -> tuple[np.ndarray, np.ndarray]:
        """(row, receiver) of everything that rank ``me`` sends forward."""
        group = self.group
        receivers = group.owner_ranks[self._owner[held]]
        away = group.src_of[receivers] != group.src_of[me]
        turn = self._turn(held[:, None], receivers, group.layout.src_tp_size)
        row, copy = np.nonzero(away & (turn == group.src_copy[me]))
        return held[row], receivers[row, copy]

    def _gradients_to_send(self, owned: np.ndarray, me: int) -> tuple[np.ndarray, np.ndarray]:
        """(row, receiver) of everything that rank ``me`` sends backward."""
        group = self.group
        receivers = group.src_ranks[self._src[owned]]
        away = group.owner_of[receivers] != group.owner_of[me]
        turn = self._turn(owned[:, None], receivers, group.copies)
        row, copy = np.nonzero(away & (turn == group.owner_copy[me]))
        return owned[row], receivers[row, copy]

    def _turn(self, rows: np.ndarray, receiver: np.ndarray | int, copies: int) -> np.ndarray:
        """Which of ``copies`` equal ranks sends a row to a receiver."""
        stretch = self._in_cell[rows] * copies // self._cell_size[rows]
        return (stretch + receiver) % copies

    def _leg(
        self, index: np.ndarray, receivers: np.ndarray, senders: np.ndarray, moves: bool
    ) -> Leg:
        size = self.group.size
        return Leg(
            send_index=index[np.argsort(receivers, kind="stable")],
            send_splits=np.bincount(receivers, minlength=size),
            recv_splits=np.bincount(senders, minlength=size),
            moves=moves,
        )


def _as_runs(held: Sequence[Any], src_cp: int) -> list[Runs]:
    if held and all(isinstance(each, (int, np.integer)) for each in held):
        if src_cp > 1:
            raise ValueError(
                f"held is given as numbers of rows {list(held)}, but the encoder's {src_cp} CP "
                "ranks hold a part of each item; give the runs of each, as rows_of_parts makes "
                "them of the rows per item"
            )
        return consecutive(held)
    return [np.asarray(runs, dtype=np.int64).reshape(-1, 2) for runs in held]


def _token_arrays(tokens: Iterable[TokenRuns]) -> Iterable[np.ndarray]:
    for each in tokens:
        packed = each.cu_seqlens or ()
        yield np.array([each.batch, each.seq_len, each.cu_seqlens is not None], dtype=np.int64)
        yield np.array(packed, dtype=np.int64)
        yield each.runs


def _digest(arrays: Iterable[np.ndarray]) -> int:
    """A signed 64-bit number of integer arrays, their shapes included."""
    state = hashlib.blake2b(digest_size=8)
    for array in arrays:
        values = np.ascontiguousarray(array, dtype="<i8")
        state.update(np.array([values.ndim, *values.shape], dtype="<i8").tobytes())
        state.update(values.tobytes())
    return int.from_bytes(state.digest(), "little", signed=True)
