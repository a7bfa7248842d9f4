# SPDX-License-Identifier: Apache-2.0
"""Ranks as a named box, and process groups made from it on request.

``GridShape`` (``mimo_colocated/grid_shape.py``) is the pure part. ``HyperCommGrid`` adds what needs
a world: groups over any dims, and further factorisations ("views") of the same ranks. Stock
Megatron-Core imports this module while ``megatron.core`` itself is being imported, so nothing of
``megatron`` is imported here.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch.distributed as dist

from mimo_colocated.communicators import Lane, lane_of
from mimo_colocated.grid_shape import GridShape, check_box
from mimo_colocated.process_groups import is_member, make_groups, release_group
from mimo_colocated.shared_groups import SharedGroup, members, share_groups

_is_process_group_member = is_member

_BASE_VIEW_NAME = "base"

# A base group's key is its dims joined with dashes; a view's own group has (view, dims).
_GroupKey = str | tuple[str, tuple[str, ...]]


@dataclass(frozen=True)
class _RankViewSpec:
    """One named factorisation of a grid's ranks; ``shared_dims`` use the base view's groups."""

    name: str
    shape: list[int]
    dim_names: list[str]
    shared_dims: list[str]
    rank_offset: int = 0

    @cached_property
    def box(self) -> GridShape:
        """The ranks in it."""
        return _box(self.shape, self.dim_names, self.rank_offset)


class HyperCommGrid:
    """Ranks as an N-D box with named dims; makes each process group once, when asked to.

    Groups are made by ``create_pg`` only, since that is where options for the group are given;
    ``get_pg`` hands out what exists. All ranks of the world must call ``create_pg`` in the same
    order. Every method works on the base view unless ``view=`` names a registered one.

    >>> grid = HyperCommGrid([2, 2, 2], ["tp", "cp", "dp"])  # with WORLD_SIZE=8
    >>> grid.get_rank_enum(["cp", "dp"])
    [[0, 2, 4, 6], [1, 3, 5, 7]]

    Args:
        shape: size of each dim.
        dim_names: name of each dim; the first varies fastest over ranks.
        rank_offset: the grid's first rank.
        backend: backend of its process groups; ``None`` is the default group's.

    Raises:
        ValueError: as ``GridShape``.
        RuntimeError: the world size is unknown, or the grid does not fit into it.
    """

    def __init__(
        self,
        shape: list[int],
        dim_names: list[str],
        rank_offset: int = 0,
        backend: str | None = None,
    ) -> None:
        box = _box(shape, dim_names, rank_offset)
        world_size = _world_size()
        if box.size > world_size - rank_offset:
            raise RuntimeError(
                f"Grid shape {shape} is over sized with world size {world_size} and rank offset "
                f"{rank_offset}: it needs {box.size} ranks and {world_size - rank_offset} are "
                "there. Launch more ranks or shrink a dim."
            )
        self.shape = shape[:]
        self.dim_names = dim_names[:]
        self.rank_offset = rank_offset
        self.size = box.size
        self.backend = backend
        base = _RankViewSpec(_BASE_VIEW_NAME, shape[:], dim_names[:], [], rank_offset)
        self._views: dict[str, _RankViewSpec] = {_BASE_VIEW_NAME: base}
        # None on a rank in no group; who asks for a group to use it is in one, hence not Optional.
        self._pgs: dict[_GroupKey, Any] = {}
        # Who is in the groups that are here, and in which lane, to use them instead of twins.
        self._members: dict[_GroupKey, tuple[Lane, frozenset[tuple[int, ...]]]] = {}
        self._taken: list[SharedGroup] = []

    def coords(self, rank: int) -> dict[str, int]:
        """Return the coordinate of a global rank along each dim of the base view.

        Raises:
            ValueError: the rank is outside the grid.
        """
        return self._base.coords(rank)

    def dim_size(self, name: str) -> int:
        """Return the size of one dim of the base view; 1 if it has no such dim."""
        return self._base.dim_size(name)

    def is_current_rank_in_grid(self) -> bool:
        """Return whether this process's global rank is one of the grid's."""
        return dist.get_rank() in self._base.ranks

    def register_view(
        self,
        name: str,
        shape: list[int],
        dim_names: list[str],
        shared_dims: list[str] | None = None,
    ) -> None:
        """Add another factorisation of the same ranks, e.g. (expert-tp, ep, pp, expert-dp).

        Args:
            name: how ``view=`` calls it; new.
            shape, dim_names: as for the grid; the sizes multiply to the grid's size.
            shared_dims: dims that mean the same in both views and so share process groups.

        Raises:
            ValueError: the name is taken, the view does not cover the grid's ranks, or a shared
                dim is unknown to one view or groups the ranks differently.
        """
        if name in self._views:
            raise ValueError(
                f"View {name!r} is already registered; registered are {sorted(self._views)}"
            )
        box = _box(shape, dim_names, self.rank_offset, view=name)
        if box.size != self.size:
            raise ValueError(
                f"View {name!r} shape {shape} has size {box.size}, but the grid size is "
                f"{self.size} (shape {self.shape})"
            )
        shared = list(shared_dims or [])
        self._check_shared(name, box, shared)
        spec = _RankViewSpec(name, shape[:], dim_names[:], shared, self.rank_offset)
        self._views[name] = spec

    def create_pg(
        self, dims: str | list[str], *, view: str | None = None, **kwargs: Any
    ) -> dist.ProcessGroup | None:
        """Create every group over ``dims`` and return this rank's; all ranks of the world call it.

        Args:
            dims: one dim or several, in any order.
            view: a registered view; ``None`` is the base view.
            kwargs: ``timeout``, ``pg_options``, ``group_desc``, as
                :func:`~mimo_colocated.process_groups.make_groups` takes them.

        Returns:
            The group that this rank is in, ``None`` for a rank outside the grid.

        Raises:
            KeyError: this group exists already, or there is no such view.
            ValueError: the view has no such dim.
        """
        key, box, ordered = self._locate(dims, view)
        if key in self._pgs:
            raise KeyError(
                f"Process group {dims}{_of_view(key)} has already been created. Its options "
                "cannot be compared with the ones given now, so it is not handed out again: "
                "use get_pg."
            )
        rank_enum = box.enumerate_groups(ordered)
        # Said of a rank that is waited for.
        kwargs.setdefault("group_desc", "-".join(ordered))
        self._pgs[key] = make_groups(rank_enum, self.backend, **kwargs)
        self._members[key] = lane_of(ordered), members(rank_enum)
        return self._pgs[key]

    def get_or_create_pg(
        self, dims: str | list[str], *, view: str | None = None, connect: bool = True
    ) -> dist.ProcessGroup:
        """Return this rank's group over ``dims``, made before or made now (a collective).

        Dims of size 1 change no group, so one over the others serves, too: "tp-pp" with PP 1 is
        "tp". A group costs memory and connections on every rank, so it may be another grid's, see
        :meth:`keep_pg`.

        Args:
            dims, view: as of :meth:`create_pg`.
            connect: as of :meth:`keep_pg`.

        Raises:
            KeyError: there is no such view.
            ValueError: the view has no such dim.
        """
        key, box, ordered = self._locate(dims, view)
        found: Any = self.keep_pg(
            key, box.enumerate_groups(ordered), lane=lane_of(ordered), connect=connect
        )
        return found

    def keep_pg(
        self,
        key: _GroupKey,
        rank_enum: list[list[int]],
        *,
        lane: Lane = Lane.BETWEEN,
        connect: bool = True,
    ) -> dist.ProcessGroup | None:
        """Make groups inside the grid, keep this rank's under ``key`` and return it.

        For groups that are no box of dims (first and last pipeline stage). Groups over the same
        ranks are used again where their lanes allow it: the grid's own and, but for
        ``Lane.BESIDE``, those that other grids have made. Else all ranks of the world make them.

        Args:
            key: a new one; with a known one the rest is not looked at.
            rank_enum: ranks of each group, none in two of them.
            lane: beside what their collectives run.
            connect: whether groups that are made now connect at once, see
                :func:`~mimo_colocated.process_groups.make_groups`.
        """
        if key in self._pgs:
            return self._pgs[key]
        wanted, name = members(rank_enum), key if isinstance(key, str) else "-".join(key[1])
        same = (k for k, (own, m) in self._members.items() if m == wanted and lane.meets(own))
        twin = next(same, None)
        if twin is not None:
            self._pgs[key] = self._pgs[twin]
        elif lane is Lane.BESIDE and any(len(ranks) > 1 for ranks in rank_enum):
            made = make_groups(rank_enum, self.backend, connect=connect, group_desc=name)
            self._pgs[key], self._members[key] = made, (lane, wanted)
        else:
            self._pgs[key], shared = share_groups(
                rank_enum, self.backend, connect=connect, group_desc=name
            )
            self._taken.append(shared)
            # One that all grids may use is in none's way.
            self._members[key] = Lane.WITHIN, wanted
        return self._pgs[key]

    def get_pg(self, dims: str | list[str], *, view: str | None = None) -> dist.ProcessGroup:
        """Return this rank's group over ``dims``, which ``create_pg`` has made before.

        Raises:
            KeyError: it was not created, or there is no such view.
            ValueError: the view has no such dim.
        """
        key, _, ordered = self._locate(dims, view)
        if key not in self._pgs:
            raise KeyError(
                f"Process group for {'-'.join(ordered)}{_of_view(key)} hasn't been created. Call "
                "create_pg first."
            )
        return self._pgs[key]

    def get_rank_enum(self, dims: str | list[str], *, view: str | None = None) -> list[list[int]]:
        """Return the ranks of every group over ``dims``, just as ``create_pg`` would group them.

        Whatever the order in ``dims``, the dim that comes first in ``dim_names`` is fastest.
        """
        spec = self._resolve_view(view)
        return spec.box.enumerate_groups(self._order_dims_for_view(spec, dims)[0])

    def destroy(self) -> None:
        """Destroy each process group that this grid made and this rank is in; idempotent.

        Groups that other grids use as well end with the last of them.
        """
        groups = {id(pg): pg for pg in self._pgs.values()}
        shared, self._taken = self._taken, []
        self._pgs.clear()
        self._members.clear()
        for each in shared:
            groups.pop(id(each.group), None)
            each.give_back()
        for pg in groups.values():
            release_group(pg)

    @property
    def _base(self) -> GridShape:
        return self._views[_BASE_VIEW_NAME].box

    def _gen_rank_enum(self, dims: list[str]) -> list[list[int]]:
        """Groups over ``dims`` of the base view, the last of ``dims`` fastest (no reordering)."""
        return self._gen_rank_enum_for(self.shape, self.dim_names, dims)

    def _gen_rank_enum_for(
        self, shape: list[int], dim_names: list[str], dims: list[str]
    ) -> list[list[int]]:
        """The same over another factorisation of the grid's ranks."""
        return _box(shape, dim_names, self.rank_offset).enumerate_groups(dims)

    def _order_dims(self, dims: str | list[str]) -> tuple[list[str], str]:
        """``_order_dims_for`` on the base view (the name that Megatron-Core 0.16 has)."""
        return self._order_dims_for(self.dim_names, dims)

    def _order_dims_for(self, dim_names: list[str], dims: str | list[str]) -> tuple[list[str], str]:
        """``dims`` slowest first under ``dim_names``, and the same joined with dashes.

        Raises:
            ValueError: a dim is not in ``dim_names``, or is given twice.
        """
        wanted = [dims] if isinstance(dims, str) else list(dims)
        for dim in wanted:
            if dim not in dim_names:
                raise ValueError(f"{dim!r} is not in list {list(dim_names)} of dim_names")
        if len(set(wanted)) != len(wanted):
            raise ValueError(f"A dim is given twice in {wanted}; name each at most once")
        ordered = sorted(wanted, key=lambda dim: -dim_names.index(dim))
        return ordered, "-".join(ordered)

    def _resolve_view(self, view: str | None) -> _RankViewSpec:
        """The view of that name, ``None`` for the base view."""
        name = _BASE_VIEW_NAME if view is None else view
        if name not in self._views:
            raise KeyError(
                f"View {name!r} is not registered. Registered views: {sorted(self._views)}"
            )
        return self._views[name]

    def _order_dims_for_view(
        self, view: _RankViewSpec, dims: str | list[str]
    ) -> tuple[list[str], str]:
        """``_order_dims_for`` on a view; the error names it."""
        for dim in [dims] if isinstance(dims, str) else dims:
            if dim not in view.dim_names:
                raise ValueError(
                    f"{dim!r} is not in view {view.name!r} with dim_names {view.dim_names}"
                )
        return self._order_dims_for(view.dim_names, dims)

    def _locate(
        self, dims: str | list[str], view: str | None
    ) -> tuple[_GroupKey, GridShape, list[str]]:
        """Where groups over ``dims`` are kept, the box that numbers them, the dims in its order."""
        spec = self._resolve_view(view)
        ordered, _ = self._order_dims_for_view(spec, dims)
        key, spec, ordered = self._canonical_pg_key_and_enum_view(spec, ordered)
        return key, spec.box, ordered

    def _canonical_pg_key_and_enum_view(
        self, view: _RankViewSpec, ordered_dims: list[str]
    ) -> tuple[_GroupKey, _RankViewSpec, list[str]]:
        """Where groups are kept, the view that numbers them, the dims in that view's order.

        Groups over shared dims are the base view's.
        """
        if view.name != _BASE_VIEW_NAME:
            if not set(ordered_dims) <= set(view.shared_dims):
                return (view.name, tuple(ordered_dims)), view, ordered_dims
            ordered_dims, _ = self._order_dims(ordered_dims)
        return "-".join(ordered_dims), self._views[_BASE_VIEW_NAME], ordered_dims

    def _is_base_pg_key(self, key: _GroupKey) -> bool:
        """Whether groups with this key are the base view's."""
        return isinstance(key, str)

    def _check_shared(self, name: str, box: GridShape, shared: list[str]) -> None:
        if len(set(shared)) != len(shared):
            raise ValueError(f"View {name!r} has duplicate shared_dims: {shared}")
        for dim in shared:
            if dim not in self.dim_names:
                raise ValueError(
                    f"Shared dim {dim!r} of view {name!r} is not in the base view {self.dim_names}"
                )
            if dim not in box.dim_names:
                raise ValueError(
                    f"Shared dim {dim!r} of view {name!r} is not in the view's dim_names "
                    f"{list(box.dim_names)}"
                )
            # Equal groups mean equal size and stride, so dims that agree one by one also agree
            # together.
            base, other = self._base.enumerate_groups([dim]), box.enumerate_groups([dim])
            if base != other:
                raise ValueError(
                    f"Shared dim {dim!r} has different membership across views: base enumeration "
                    f"{base} != view {name!r} enumeration {other}"
                )


def box_of(grid: Any) -> GridShape:
    """Return the ranks of what has a grid's ``shape``, ``dim_names`` and ``rank_offset``."""
    return _box(grid.shape, grid.dim_names, grid.rank_offset)


def _box(
    shape: Sequence[int], dim_names: Sequence[str], rank_offset: int, view: str | None = None
) -> GridShape:
    check_box(shape, dim_names, "" if view is None else f"View {view!r} ")
    return GridShape(tuple(int(size) for size in shape), tuple(dim_names), rank_offset)


def _world_size() -> int:
    """``WORLD_SIZE`` if it is set (grids for a world that does not run yet), else torch's."""
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    if dist.is_initialized():
        return dist.get_world_size()
    raise RuntimeError(
        "Cannot determine world size: WORLD_SIZE environment variable not set and "
        "torch.distributed is not initialized. Set WORLD_SIZE, or call "
        "torch.distributed.init_process_group before making a HyperCommGrid."
    )


def _of_view(key: _GroupKey) -> str:
    return "" if isinstance(key, str) else f" for view {key[0]!r}"
