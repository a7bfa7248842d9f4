# SPDX-License-Identifier: Apache-2.0
"""Who may exchange rows with whom, in integers: two grids -> exchange groups. No torch.

The encoder's replicas cut the global batch into ``src_dp`` stretches, those of the language model
into ``dest_dp``; stretches that overlap have rows to exchange. Ranks that are linked by overlaps,
directly or through others, form an *exchange group*; no DP size needs to divide the other. DP 3
beside DP 2 on 6 ranks is one group, DP 6 beside DP 4 on 12 ranks makes two::

    source replicas       0       |       1       |       2
    destination replicas        0         |          1
    ranks                 0   1   |   2   |   3   |   4   5

An encoder that cuts its items' sequences over a CP axis of its own holds a part of each item on
every CP rank. A *holder* of rows is a coordinate (dp, cp) of the source, with TP copies.

With pipeline stages on the destination side, the first stage's ranks own the rows. Those of other
stages encode like all others, so they send rows and get gradients, and own nothing. Where later
stages need a part of each row too (levels that are added after their layers), the same rows have
owners there as well: see :meth:`RouteLayout.at_stage`.

Everything is linear in the number of ranks and vectorised over them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from megatron.core.models.mimo.comm.plan.gather_layout import Grid, check_grids, check_on_bridge


@dataclass(frozen=True, eq=False)
class RouteLayout:
    """Coordinates of every rank on both sides, and the exchange groups; see :meth:`from_grids`.

    >>> from megatron.core.hyper_comm_grid import GridShape
    >>> src, dest = GridShape((2, 3), ("tp", "dp")), GridShape((1, 3, 2), ("tp", "cp", "dp"))
    >>> layout = RouteLayout.from_grids(src, dest)
    >>> layout.group_count, layout.group_of(4).ranks.tolist()
    (1, [0, 1, 2, 3, 4, 5])
    >>> layout.src_dp.tolist(), layout.dest_dp.tolist()
    ([0, 0, 1, 1, 2, 2], [0, 0, 0, 1, 1, 1])

    Attributes:
        src_name, dest_name: the modules' names, for messages.
        rank_offset, size: the ranks are ``rank_offset .. rank_offset + size - 1``.
        sequence_parallel: each destination TP rank owns its own part of the CP-local sequence.
            Without it all TP ranks of a CP rank need the same rows.
        src_dp, src_cp, src_tp, dest_dp, dest_tp, dest_cp, dest_pp: coordinate of each rank, int64
            ``(size,)``.
        component: number of each rank's exchange group, ``(size,)``.
        group_count: how many there are.
        later_stages: destination stages after the first that need a part of each row, ascending.
        dest_stage: the destination stage whose ranks own rows by this layout.
    """

    src_name: str
    dest_name: str
    rank_offset: int
    size: int
    sequence_parallel: bool
    src_tp_size: int
    src_cp_size: int
    src_dp_size: int
    dest_tp_size: int
    dest_cp_size: int
    dest_dp_size: int
    src_dp: np.ndarray
    src_cp: np.ndarray
    src_tp: np.ndarray
    dest_dp: np.ndarray
    dest_tp: np.ndarray
    dest_cp: np.ndarray
    dest_pp: np.ndarray
    component: np.ndarray
    group_count: int
    later_stages: tuple[int, ...] = ()
    dest_stage: int = 0

    @classmethod
    def from_grids(
        cls,
        src_grid: Grid,
        dest_grid: Grid,
        src_name: str = "src",
        dest_name: str = "dest",
        *,
        sequence_parallel: bool = False,
        one_group: bool = False,
        later_stages: tuple[int, ...] = (),
    ) -> RouteLayout:
        """Lay out the exchange between two grids.

        Args:
            src_grid, dest_grid: encoder's and language model's grid, over the same ranks; the
                language model's may have pipeline stages, both may have CP.
            src_name, dest_name: for messages.
            sequence_parallel: the language model cuts its sequence over TP too.
            one_group: let every rank exchange with every other, for batches that are not cut
                where the DP replicas' shares meet (assignments across the whole world).
            later_stages: pipeline stages after the first that need a part of each row.

        Raises:
            ValueError: the grids do not cover the same ranks, one lacks ``tp`` or ``dp``, a size
                that must be 1 is not, or ``dp`` is named before ``cp``.
        """
        check_grids(src_grid, dest_grid, src_dims=("tp", "cp", "dp"))
        src_dp, src_cp, src_tp = (_coordinates(src_grid, dim) for dim in ("dp", "cp", "tp"))
        dest_dp, dest_tp, dest_cp = (_coordinates(dest_grid, d) for d in ("dp", "tp", "cp"))
        sizes = src_grid.dim_size("dp"), dest_grid.dim_size("dp")
        component = _components(src_dp, dest_dp, 1 if one_group else math.gcd(*sizes), *sizes)
        return cls(
            src_name=src_name,
            dest_name=dest_name,
            rank_offset=src_grid.rank_offset,
            size=src_grid.size,
            sequence_parallel=sequence_parallel,
            src_tp_size=src_grid.dim_size("tp"),
            src_cp_size=src_grid.dim_size("cp"),
            src_dp_size=sizes[0],
            dest_tp_size=dest_grid.dim_size("tp"),
            dest_cp_size=dest_grid.dim_size("cp"),
            dest_dp_size=sizes[1],
            src_dp=src_dp,
            src_cp=src_cp,
            src_tp=src_tp,
            dest_dp=dest_dp,
            dest_tp=dest_tp,
            dest_cp=dest_cp,
            dest_pp=_coordinates(dest_grid, "pp"),
            component=component,
            group_count=int(component.max()) + 1,
            later_stages=tuple(later_stages),
        )

    def at_stage(self, stage: int) -> RouteLayout:
        """The same exchange with owners on another pipeline stage."""
        return replace(self, dest_stage=stage, later_stages=())

    @property
    def ranks(self) -> range:
        """Every rank of the bridge, ascending."""
        return range(self.rank_offset, self.rank_offset + self.size)

    def group_of(self, rank: int) -> ExchangeGroup:
        """Return the exchange group of a global rank.

        Raises:
            ValueError: the rank is outside the grids.
        """
        check_on_bridge(rank, self.ranks, self.src_name, self.dest_name)
        number = self.component[rank - self.rank_offset]
        return ExchangeGroup(self, np.flatnonzero(self.component == number))

    def groups(self) -> Iterator[ExchangeGroup]:
        """Return every exchange group, by number."""
        order = np.argsort(self.component, kind="stable")
        ends = np.cumsum(np.bincount(self.component))
        yield from (ExchangeGroup(self, members) for members in np.split(order, ends[:-1]))


@dataclass(frozen=True, eq=False)
class ExchangeGroup:
    """The ranks that exchange rows with one another, numbered by their place in the group.

    An *owner* is a destination coordinate that owns sequence positions: (dp, cp), with sequence
    parallelism (dp, cp, tp). It is one rank with sequence parallelism, else ``copies`` TP ranks,
    all on one pipeline stage, the first one unless the layout says another.

    Attributes:
        layout: of the whole bridge.
        members: place in the layout of each rank, ascending, which is the order in which torch
            numbers a process group's members too.
    """

    layout: RouteLayout
    members: np.ndarray

    @cached_property
    def ranks(self) -> np.ndarray:
        """Global ranks, ascending."""
        return self.members + self.layout.rank_offset

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.members.size

    def at_stage(self, stage: int) -> ExchangeGroup:
        """The same ranks, with owners on another pipeline stage."""
        return ExchangeGroup(self.layout.at_stage(stage), self.members)

    def index(self, rank: int) -> int:
        """Place of a global rank in the group.

        Raises:
            ValueError: the rank is not in it.
        """
        place = int(np.searchsorted(self.ranks, rank))
        if place == self.size or self.ranks[place] != rank:
            raise ValueError(f"Rank {rank} is not in the exchange group {brief(self.ranks)}")
        return place

    @cached_property
    def src_dps(self) -> np.ndarray:
        """DP indices of the group's source replicas, ascending."""
        return np.unique(self.layout.src_dp[self.members])

    @cached_property
    def dest_dps(self) -> np.ndarray:
        """DP indices of the group's destination replicas, ascending."""
        return np.unique(self.layout.dest_dp[self.members])

    @property
    def holders(self) -> int:
        """Number of holders of rows: CP ranks of all the group's source replicas."""
        return self.src_dps.size * self.layout.src_cp_size

    @cached_property
    def src_of(self) -> np.ndarray:
        """The holder that each rank is (a copy of): replica, as in :attr:`src_dps`, then CP."""
        replica = np.searchsorted(self.src_dps, self.layout.src_dp[self.members])
        return replica * self.layout.src_cp_size + self.layout.src_cp[self.members]

    @cached_property
    def src_copy(self) -> np.ndarray:
        """Each rank's place among the TP copies of its holder."""
        return self.layout.src_tp[self.members]

    @cached_property
    def dest_of(self) -> np.ndarray:
        """Each rank's destination replica, as an index into :attr:`dest_dps`."""
        return np.searchsorted(self.dest_dps, self.layout.dest_dp[self.members])

    @cached_property
    def owner_of(self) -> np.ndarray:
        """The owner that each rank is (a copy of), numbered as :meth:`owner`; -1 for none."""
        at = self.layout
        owner = self.owner(self.dest_of, at.dest_cp[self.members], at.dest_tp[self.members])
        return np.where(at.dest_pp[self.members] == at.dest_stage, owner, -1)

    @cached_property
    def owner_copy(self) -> np.ndarray:
        """Each rank's place among the copies of its owner."""
        tp = self.layout.dest_tp[self.members]
        return np.zeros_like(tp) if self.layout.sequence_parallel else tp

    @property
    def copies(self) -> int:
        """Ranks per owner."""
        return 1 if self.layout.sequence_parallel else self.layout.dest_tp_size

    @property
    def sequence_parts(self) -> tuple[int, int]:
        """CP and TP sizes that a sequence is cut by."""
        tp = self.layout.dest_tp_size if self.layout.sequence_parallel else 1
        return self.layout.dest_cp_size, tp

    def owner(self, dest: np.ndarray | int, cp: np.ndarray, tp: np.ndarray) -> np.ndarray:
        """Number of an owner: replica, then CP, then, with sequence parallelism, TP."""
        cp_size, tp_size = self.sequence_parts
        number = dest * cp_size + cp
        return number * tp_size + tp if self.layout.sequence_parallel else number

    @cached_property
    def src_ranks(self) -> np.ndarray:
        """Places in the group of every holder's TP ranks, ``(holders, tp)``."""
        table = np.empty((self.holders, self.layout.src_tp_size), dtype=np.int64)
        table[self.src_of, self.src_copy] = np.arange(self.size)
        return table

    @cached_property
    def owner_ranks(self) -> np.ndarray:
        """Places in the group of every owner's copies, ``(owners, copies)``."""
        parts = self.sequence_parts[0] * self.sequence_parts[1]
        table = np.empty((self.dest_dps.size * parts, self.copies), dtype=np.int64)
        first = np.flatnonzero(self.owner_of >= 0)
        table[self.owner_of[first], self.owner_copy[first]] = first
        return table

    def signature(self) -> tuple[np.ndarray, ...]:
        """Return everything about the layout that its ranks must agree on."""
        at = self.layout
        flags = [at.sequence_parallel, at.size, at.rank_offset, at.src_cp_size, *at.later_stages]
        return np.array(flags, dtype=np.int64), self.ranks, self.src_ranks, self.owner_ranks


def _coordinates(grid: Grid, dim: str) -> np.ndarray:
    """Coordinate of every rank along one dim: :meth:`Grid.coords`, for all ranks at once."""
    names = list(grid.dim_names)
    if dim not in names:
        return np.zeros(grid.size, dtype=np.int64)
    stride = math.prod(grid.shape[: names.index(dim)])
    return np.arange(grid.size, dtype=np.int64) // stride % grid.dim_size(dim)


def _components(
    src_dp: np.ndarray, dest_dp: np.ndarray, blocks: int, src_dp_size: int, dest_dp_size: int
) -> np.ndarray:
    """Number of every rank's exchange group.

    The batch falls into ``blocks`` parts where cuts of both sides meet. A rank whose replicas lie
    in different parts (``dp`` not the slowest dim) joins the two.
    """
    src_block = src_dp // (src_dp_size // blocks)
    dest_block = dest_dp // (dest_dp_size // blocks)
    root = np.arange(blocks)
    apart = src_block != dest_block
    for one, other in np.unique(np.stack([src_block, dest_block], 1)[apart], axis=0).tolist():
        low, high = sorted((_root(root, one), _root(root, other)))
        root[high] = low
    roots = np.array([_root(root, block) for block in range(blocks)], dtype=np.int64)
    return np.unique(roots, return_inverse=True)[1].reshape(-1)[src_block]


def _root(root: np.ndarray, block: int) -> int:
    while root[block] != block:
        root[block] = root[root[block]]
        block = int(root[block])
    return block


def brief(ranks: np.ndarray) -> str:
    """Return ranks for a message, as stretches.

    >>> brief(np.array([0, 1, 2, 5]))
    '0-2, 5'
    """
    cuts = np.flatnonzero(np.diff(ranks) != 1) + 1
    parts = [(int(part[0]), int(part[-1])) for part in np.split(ranks, cuts) if part.size]
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in parts)
