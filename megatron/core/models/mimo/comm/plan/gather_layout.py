# SPDX-License-Identifier: Apache-2.0
"""Who holds which samples on either side of a bridge, in integers. No torch, no process group.

Two grids lie over the same ranks. The source cuts a global batch into ``src_dp`` blocks, the
destination into ``dest_dp``; TP ranks (and CP ranks of the destination) hold copies of a block.
One DP size divides the other, so ``scale`` blocks of the finer side make one of the coarser side.
TP4·DP2 -> TP1·CP2·DP4 on 8 ranks, a fan-out by 2 (a block is written by its share of the batch)::

    rank         0     1     2     3     4     5     6     7
    source      0..1/2 ------------------ | 1/2..1 -----------
    destination 0..1/4 --- | 1/4..1/2 --- | 1/2..3/4 - | 3/4..1
    gather groups (backward)   [0, 2] [1, 3] [4, 6] [5, 7]

With pipeline stages of the destination (``pp``) every stage of a replica takes the same block; the
gradient is that of the first stage's ranks.

Everything is linear in the number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol


class Grid(Protocol):
    """What a layout reads of a grid: ``HyperCommGrid`` and the pure ``GridShape`` both have it."""

    # Properties: a frozen class has them, too.
    @property
    def dim_names(self) -> Sequence[str]:
        """Names of the dims, the fastest first."""
        ...

    @property
    def shape(self) -> Sequence[int]:
        """Size of each dim."""
        ...

    @property
    def rank_offset(self) -> int:
        """The first rank."""
        ...

    @property
    def size(self) -> int:
        """Number of ranks."""
        ...

    def dim_size(self, name: str) -> int:
        """Return the size of a dim, 1 if the grid has no such dim."""
        ...

    def coords(self, rank: int) -> dict[str, int]:
        """Return the coordinate of a rank along each dim."""
        ...


class BridgeDirection(str, Enum):
    """Which side has more DP replicas.

    ``FAN_IN``: the source, so forward gathers. ``FAN_OUT``: the destination, so forward takes a
    part. ``EQUAL``: neither, so data stays where it is.
    """

    FAN_IN = "fan_in"
    FAN_OUT = "fan_out"
    EQUAL = "equal"


@dataclass(frozen=True)
class SliceInfo:
    """The part ``[start, start + size)`` of a batch dim."""

    start: int
    size: int


@dataclass(frozen=True)
class BridgeLayout:
    """Positions, slots and gather groups of a bridge; make one with ``from_grids``.

    >>> from megatron.core.hyper_comm_grid import GridShape
    >>> src = GridShape((4, 2), ("tp", "dp"))
    >>> dest = GridShape((1, 2, 4), ("tp", "cp", "dp"))
    >>> layout = BridgeLayout.from_grids(src, dest)
    >>> layout.direction.value, layout.scale
    ('fan_out', 2)
    >>> layout.rank_to_dest_pos
    {0: (0, 0), 2: (1, 0), 4: (2, 0), 6: (3, 0)}
    >>> layout.gather_groups
    ((0, 2), (1, 3), (4, 6), (5, 7))
    >>> layout.dest_slice(7, 16)
    SliceInfo(start=12, size=4)

    Two pipeline stages in place of two CP ranks; gradients come from ranks 0, 2, 4 and 6:

    >>> stages = BridgeLayout.from_grids(src, GridShape((1, 2, 4), ("tp", "pp", "dp")))
    >>> stages.rank_to_dest_pos == layout.rank_to_dest_pos
    True
    >>> [rank for rank, stage in stages.rank_to_dest_stage.items() if stage == 0]
    [0, 2, 4, 6]
    >>> stages.gather_groups
    ((0, 2), (1, 3), (4, 6), (5, 7))

    Attributes:
        src_name, dest_name: the modules' names, for messages and plots.
        rank_offset, size: the ranks are ``rank_offset .. rank_offset + size - 1``.
        scale: finer DP size over coarser DP size.
        rank_to_src_pos: rank -> (dp, tp) of the source.
        rank_to_dest_pos: rank -> (dp, tp) of the destination, for ranks with CP coordinate 0 on
            the first pipeline stage.
        rank_to_dest_coords: rank -> (dp, tp, cp) of the destination, for every rank.
        rank_to_dest_stage: rank -> pipeline stage of the destination.
        gather_groups: ranks that gather from one another, members in slot order; every rank is
            in exactly one. Empty for equal DP.
    """

    src_name: str
    dest_name: str
    rank_offset: int
    size: int
    direction: BridgeDirection
    scale: int
    src_tp_size: int
    src_dp_size: int
    dest_tp_size: int
    dest_dp_size: int
    dest_cp_size: int
    dest_pp_size: int
    rank_to_src_pos: dict[int, tuple[int, int]]
    rank_to_dest_pos: dict[int, tuple[int, int]]
    rank_to_dest_coords: dict[int, tuple[int, int, int]]
    rank_to_dest_stage: dict[int, int]
    gather_groups: tuple[tuple[int, ...], ...]

    @classmethod
    def from_grids(
        cls, src_grid: Grid, dest_grid: Grid, src_name: str = "src", dest_name: str = "dest"
    ) -> BridgeLayout:
        """Check two grids against each other and lay the bridge between them.

        Raises:
            ValueError: the grids do not cover the same ranks, one lacks ``tp`` or ``dp``, a size
                that must be 1 is not, ``dp`` is named before ``cp``, no DP size divides the
                other, or the ranks of a coarser replica are not those of ``scale`` finer ones.
        """
        check_grids(src_grid, dest_grid)
        _check_dp_sizes(src_grid.dim_size("dp"), dest_grid.dim_size("dp"))
        ranks = range(src_grid.rank_offset, src_grid.rank_offset + src_grid.size)
        src_pos = {rank: _position(src_grid, rank)[:2] for rank in ranks}
        dest = {rank: _position(dest_grid, rank) for rank in ranks}
        dest_coords = {rank: (dp, tp, cp) for rank, (dp, tp, cp, _) in dest.items()}
        stage = {rank: pp for rank, (_, _, _, pp) in dest.items()}
        src_dp, dest_dp = src_grid.dim_size("dp"), dest_grid.dim_size("dp")
        direction, scale = _direction(src_dp, dest_dp)
        for rank in ranks:
            _check_nested(rank, src_pos[rank][0], dest_coords[rank][0], src_grid, dest_grid)
        return cls(
            src_name=src_name,
            dest_name=dest_name,
            rank_offset=src_grid.rank_offset,
            size=src_grid.size,
            direction=direction,
            scale=scale,
            src_tp_size=src_grid.dim_size("tp"),
            src_dp_size=src_dp,
            dest_tp_size=dest_grid.dim_size("tp"),
            dest_dp_size=dest_dp,
            dest_cp_size=dest_grid.dim_size("cp"),
            dest_pp_size=dest_grid.dim_size("pp"),
            rank_to_src_pos=src_pos,
            rank_to_dest_pos={r: at[:2] for r, at in dest.items() if at[2:] == (0, 0)},
            rank_to_dest_coords=dest_coords,
            rank_to_dest_stage=stage,
            gather_groups=_gather_groups(direction, scale, src_pos, dest),
        )

    @property
    def ranks(self) -> range:
        """Every rank of the bridge, ascending."""
        return range(self.rank_offset, self.rank_offset + self.size)

    def slot(self, rank: int) -> int:
        """Return a rank's place, ``0 .. scale - 1``, among the finer blocks of its coarser block.

        Raises:
            ValueError: the rank is not one of the bridge's.
        """
        self.check_rank(rank)
        fan_in = self.direction is BridgeDirection.FAN_IN
        fine = self.rank_to_src_pos if fan_in else self.rank_to_dest_coords
        return fine[rank][0] % self.scale

    def slot_slice(self, rank: int, batch_size: int) -> SliceInfo:
        """Return a rank's own part of its coarser block of ``batch_size``; all of it for equal DP.

        Raises:
            ValueError: ``scale`` does not divide ``batch_size``, or the rank is not one of ours.
        """
        self.check_divisible(batch_size)
        size = batch_size // self.scale
        return SliceInfo(self.slot(rank) * size, size)

    def check_divisible(self, batch_size: int) -> None:
        """Refuse a coarser block that cannot be cut into ``scale`` equal parts.

        Raises:
            ValueError: ``scale`` does not divide ``batch_size``.
        """
        if batch_size % self.scale == 0:
            return
        below = batch_size - batch_size % self.scale
        raise ValueError(
            f"Bridge {self.src_name} -> {self.dest_name}: batch dim size {batch_size} is not "
            f"divisible by {self.direction.value} scale={self.scale} (src DP {self.src_dp_size}, "
            f"dest DP {self.dest_dp_size}). Sizes that fit: multiples of {self.scale}, e.g. "
            f"{below or self.scale} or {below + self.scale}; change the micro batch size or a DP "
            "size."
        )

    def src_slice(self, rank: int, global_batch: int) -> SliceInfo:
        """Return the samples of a global batch that a rank holds on the source side.

        Raises:
            ValueError: source DP does not divide ``global_batch``, or the rank is not one of ours.
        """
        self.check_rank(rank)
        return _block(self.rank_to_src_pos[rank][0], self.src_dp_size, global_batch, self.src_name)

    def dest_slice(self, rank: int, global_batch: int) -> SliceInfo:
        """Return the samples of a global batch that a rank holds on the destination side.

        Raises:
            ValueError: dest DP does not divide ``global_batch``, or the rank is not one of ours.
        """
        self.check_rank(rank)
        return _block(
            self.rank_to_dest_coords[rank][0], self.dest_dp_size, global_batch, self.dest_name
        )

    def check_rank(self, rank: int) -> None:
        """Refuse a rank that the bridge does not span.

        Raises:
            ValueError: the rank is outside the grids.
        """
        check_on_bridge(rank, self.ranks, self.src_name, self.dest_name)


def _position(grid: Grid, rank: int) -> tuple[int, int, int, int]:
    coords = grid.coords(rank)
    return coords["dp"], coords["tp"], coords.get("cp", 0), coords.get("pp", 0)


def _direction(src_dp: int, dest_dp: int) -> tuple[BridgeDirection, int]:
    if src_dp > dest_dp:
        return BridgeDirection.FAN_IN, src_dp // dest_dp
    if dest_dp > src_dp:
        return BridgeDirection.FAN_OUT, dest_dp // src_dp
    return BridgeDirection.EQUAL, 1


def _block(index: int, count: int, global_batch: int, name: str) -> SliceInfo:
    if global_batch % count:
        raise ValueError(
            f"Global batch {global_batch} is not divisible by the {count} DP replicas of {name}; "
            f"use a multiple of {count}"
        )
    size = global_batch // count
    return SliceInfo(index * size, size)


def _gather_groups(
    direction: BridgeDirection,
    scale: int,
    src_pos: dict[int, tuple[int, int]],
    dest: dict[int, tuple[int, int, int, int]],
) -> tuple[tuple[int, ...], ...]:
    """Ranks that differ only in their slot, as one pass over the ranks.

    Fan-in: a group per (dest dp, src tp). Fan-out: one per (src dp, dest tp, dest cp, dest pp).
    CP ranks and stages are kept apart so that each has a whole set of siblings of its own.
    """
    if direction is BridgeDirection.EQUAL:
        return ()
    fine = src_pos if direction is BridgeDirection.FAN_IN else dest
    members: dict[tuple[int, ...], list[int]] = {}
    # Ascending DP index is slot order, whatever the numbers of the ranks.
    for rank in sorted(fine, key=lambda rank: fine[rank][0]):
        dp, *copy = fine[rank]
        members.setdefault((dp // scale, *copy), []).append(rank)
    return tuple(tuple(members[key]) for key in sorted(members))


def check_on_bridge(rank: int, ranks: range, src_name: str, dest_name: str) -> None:
    """Refuse a rank that the bridge does not span.

    Raises:
        ValueError: ``rank`` is not among ``ranks``.
    """
    if rank not in ranks:
        raise ValueError(
            f"Rank {rank} is not on the bridge {src_name} -> {dest_name}; its ranks are "
            f"{ranks.start} to {ranks.stop - 1}. Call this on those only."
        )


def check_grids(
    src_grid: Grid, dest_grid: Grid, src_dims: tuple[str, ...] = ("tp", "dp")
) -> None:
    """Refuse grids that no bridge can lie between, whatever their DP sizes.

    Args:
        src_grid, dest_grid: encoder's and language model's grid; the latter may have stages.
        src_dims: dims of the encoder's grid that may be larger than 1.

    Raises:
        ValueError: the grids do not cover the same ranks, one lacks ``tp`` or ``dp``, a size that
            must be 1 is not, or ``dp`` is named before ``cp``.
    """
    if src_grid.size != dest_grid.size:
        raise ValueError(
            f"Grids must span same number of ranks: src={src_grid.size} ({_dims(src_grid)}), "
            f"dest={dest_grid.size} ({_dims(dest_grid)}). Make the products of the sizes equal."
        )
    if src_grid.rank_offset != dest_grid.rank_offset:
        raise ValueError(
            f"Grids must have same rank offset: src={src_grid.rank_offset}, "
            f"dest={dest_grid.rank_offset}. Colocated modules use the same ranks; modules on "
            "other ranks need no bridge of this kind."
        )
    _check_dims("src", src_grid, bridged=src_dims)
    _check_dims("dest", dest_grid, bridged=("tp", "cp", "dp", "pp"))


def _check_dims(side: str, grid: Grid, bridged: tuple[str, ...]) -> None:
    names = list(grid.dim_names)
    for required in ("tp", "dp"):
        if required not in names:
            raise ValueError(
                f"{side} grid must have '{required}' dimension, got dim_names={names}. Name it "
                "with size 1 if it is not used."
            )
    for name in names:
        if grid.dim_size(name) > 1 and name not in bridged:
            raise ValueError(
                f"{side} {name.upper()} must be 1 for a colocated bridge, got "
                f"{grid.dim_size(name)} in {_dims(grid)}. Only {bridged} may be larger on this "
                f"side; give those ranks to DP or TP"
                + (", or use bridge='routed'." if (side, name) == ("src", "cp") else ".")
            )
    if side == "dest" and "cp" in names and names.index("dp") < names.index("cp"):
        raise ValueError(
            f"dest grid must have 'cp' before 'dp' in dim_names, got {names}: the CP ranks of a "
            "replica lie inside it. Use e.g. ['tp', 'cp', 'dp']."
        )


def _check_dp_sizes(src_dp: int, dest_dp: int) -> None:
    if max(src_dp, dest_dp) % min(src_dp, dest_dp) == 0:
        return
    divisors = [n for n in range(1, dest_dp + 1) if dest_dp % n == 0]
    raise ValueError(
        f"DP sizes must be evenly divisible, one by the other: src_dp={src_dp}, "
        f"dest_dp={dest_dp}. With dest DP {dest_dp} the source's DP may be one of {divisors} or "
        f"any multiple of {dest_dp}."
    )


def _check_nested(
    rank: int, src_index: int, dest_index: int, src_grid: Grid, dest_grid: Grid
) -> None:
    """Refuse grids where a rank's finer block lies outside its coarser block.

    The bridge moves data inside a coarser replica only, so such a rank would train on another
    replica's samples and nothing would crash.
    """
    src_dp, dest_dp = src_grid.dim_size("dp"), dest_grid.dim_size("dp")
    coarse_dp = min(src_dp, dest_dp)
    if src_index * coarse_dp // src_dp == dest_index * coarse_dp // dest_dp:
        return
    raise ValueError(
        f"DP replicas of the grids must nest: rank {rank} is in src replica {src_index} of "
        f"{src_dp} ({_dims(src_grid)}) and in dest replica {dest_index} of {dest_dp} "
        f"({_dims(dest_grid)}), which hold different samples. Name 'dp' after all other dims in "
        "both grids (make_grid(..., dp_last=True)), or use bridge='routed'."
    )


def _dims(grid: Grid) -> str:
    return " ".join(f"{name}={grid.dim_size(name)}" for name in grid.dim_names)
