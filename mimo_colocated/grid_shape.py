# SPDX-License-Identifier: Apache-2.0
"""Ranks as a named box: integers only, neither torch nor Megatron-Core.

The dim that is named first varies fastest: ``rank = rank_offset + sum(coord[d] * stride[d])``,
where a dim's stride is the product of the sizes named before it.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class GridShape:
    """A named box over the ranks ``rank_offset .. rank_offset + size - 1``; first dim fastest.

    >>> box = GridShape((2, 2, 2), ("tp", "cp", "dp"))
    >>> box.coords(5)
    {'tp': 1, 'cp': 0, 'dp': 1}
    >>> box.enumerate_groups(["cp"])
    [[0, 2], [1, 3], [4, 6], [5, 7]]

    Args:
        shape: size of each dim, a positive integer.
        dim_names: name of each dim, no name twice.
        rank_offset: the box's first rank.

    Raises:
        ValueError: lengths differ, a size is not a positive integer, a name occurs twice, or the
            offset is negative.
    """

    shape: tuple[int, ...]
    dim_names: tuple[str, ...]
    rank_offset: int = 0
    _strides: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_box(self.shape, self.dim_names, "")
        if self.rank_offset < 0:
            raise ValueError(f"rank_offset must be non-negative, got {self.rank_offset}")
        strides = {name: math.prod(self.shape[:axis]) for axis, name in enumerate(self.dim_names)}
        object.__setattr__(self, "_strides", strides)

    @property
    def size(self) -> int:
        """Number of ranks in the box."""
        return math.prod(self.shape)

    @property
    def ranks(self) -> range:
        """Every rank of the box, ascending."""
        return range(self.rank_offset, self.rank_offset + self.size)

    def dim_size(self, name: str) -> int:
        """Return the size of one dim; 1 for a dim that the box does not name."""
        return self.shape[self.dim_names.index(name)] if name in self.dim_names else 1

    def coords(self, rank: int) -> dict[str, int]:
        """Return where a rank lies: its coordinate along each dim, in ``dim_names`` order.

        Raises:
            ValueError: the rank is outside the box.
        """
        if rank not in self.ranks:
            raise ValueError(
                f"Rank {rank} is not in the grid {self._describe()}; its ranks are "
                f"{self.ranks.start} to {self.ranks.stop - 1}"
            )
        place = rank - self.rank_offset
        return {
            name: place // self._strides[name] % size
            for name, size in zip(self.dim_names, self.shape, strict=True)
        }

    def enumerate_groups(self, dims: Sequence[str]) -> list[list[int]]:
        """Return the ranks of every group over ``dims``; inside, the *last* of ``dims`` is fastest.

        Groups follow one another with the remaining dims, the first-named fastest. Linear in
        the number of ranks.

        >>> GridShape((2, 2), ("a", "b")).enumerate_groups(["a", "b"])
        [[0, 2, 1, 3]]
        """
        members = self._steps(dims)
        others = [name for name in reversed(self.dim_names) if name not in dims]
        return [
            [self.rank_offset + first + step for step in members] for first in self._steps(others)
        ]

    def steps_along(self, dims: Iterable[str]) -> tuple[tuple[int, int], ...]:
        """Return how a group over ``dims`` lies: (distance, how many) pairs, the nearest first.

        Dims of size 1 are left out and neighbours are one, so boxes over the same ranks that have
        equal steps have equal groups, and the other way round. No rank is looked at.

        >>> box = GridShape((2, 2, 2), ("tp", "cp", "dp"))
        >>> box.steps_along(["tp", "dp"]), box.steps_along(["cp", "tp"])
        (((1, 2), (4, 2)), ((1, 4),))
        """
        found: list[tuple[int, int]] = []
        for stride, size in sorted((self._strides[d], self.dim_size(d)) for d in dims):
            if size > 1 and found and found[-1][0] * found[-1][1] == stride:
                found[-1] = (found[-1][0], found[-1][1] * size)
            elif size > 1:
                found.append((stride, size))
        return tuple(found)

    def _steps(self, dims: Iterable[str]) -> list[int]:
        """Rank distances that moving along ``dims`` reaches from coordinate 0; last fastest."""
        steps = [0]
        for name in dims:
            stride, size = self._strides[name], self.dim_size(name)
            steps = [base + stride * coord for base in steps for coord in range(size)]
        return steps

    def _describe(self) -> str:
        return " x ".join(
            f"{name}={size}" for name, size in zip(self.dim_names, self.shape, strict=True)
        )


def check_box(shape: Sequence[int], dim_names: Sequence[str], label: str) -> None:
    """Refuse what is no box: other numbers of sizes and names, no positive integers, a name twice.

    Args:
        shape, dim_names: as of :class:`GridShape`.
        label: what the message begins with.

    Raises:
        ValueError: with both sides.
    """
    if len(shape) != len(dim_names):
        raise ValueError(
            f"{label}len(shape) {shape} != len(dim_names) {dim_names}: {len(shape)} sizes for "
            f"{len(dim_names)} names"
        )
    if any(not isinstance(size, numbers.Integral) or size <= 0 for size in shape):
        raise ValueError(f"{label}shape must be positive ints, got {shape} for {dim_names}")
    if len(set(dim_names)) != len(dim_names):
        verb = "has" if label else "Grid has"
        raise ValueError(f"{label}{verb} duplicate dim_names: {dim_names}; name each dim once")
