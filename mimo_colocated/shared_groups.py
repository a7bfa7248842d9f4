# SPDX-License-Identifier: Apache-2.0
"""Process groups that several grids use: made by the first that asks, ended by the last that goes.

Every rank of the world asks and gives back in the same order, as it makes groups, so all know
alike which groups are there. Which groups may be shared says ``communicators.py``.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from mimo_colocated.process_groups import is_member, make_groups, release_group

# Those of a world are forgotten with it.
_of_world: WeakKeyDictionary[Any, dict[Hashable, SharedGroup]] = WeakKeyDictionary()


class SharedGroup:
    """This rank's of several groups, and how many users it has.

    Attributes:
        group: ``None`` on a rank that is in none of them.
    """

    def __init__(self, group: Any, known: dict[Hashable, SharedGroup], key: Hashable) -> None:
        self.group = group
        self._users, self._known, self._key = 0, known, key

    def taken(self) -> SharedGroup:
        """Return this, with one user more."""
        self._users += 1
        return self

    def give_back(self) -> None:
        """End the group if this was its last user; called once per user."""
        self._users -= 1
        if self._users == 0:
            if self._known.get(self._key) is self:
                del self._known[self._key]
            release_group(self.group)

    def is_alive(self) -> bool:
        """Return whether nobody has destroyed the group; a rank outside it cannot know."""
        return not is_member(self.group) or self.group in c10d._world.pg_map


class _WorldGroup(SharedGroup):
    """The default group, which no grid ends."""

    def give_back(self) -> None:
        """Do nothing."""


def share_groups(
    rank_enum: list[list[int]], backend: str | None, *, connect: bool, group_desc: str
) -> tuple[Any, SharedGroup]:
    """Return this rank's of the groups, made if no grid has made them, and what to give back.

    One group of all ranks is the default group, where the backend is its. All groups of one rank
    are the same, and do not connect. A collective of the world, as ``make_groups``.

    Args:
        rank_enum: ranks of each group, none in two of them.
        backend, connect, group_desc: as of :func:`~.process_groups.make_groups`, if they are made.
    """
    world = c10d._world.default_pg
    if world is None:  # Without one, groups are nobody else's.
        shared = _shared({}, rank_enum, backend, connect, group_desc)
        return shared.group, shared
    known = _of_world.setdefault(world, {})
    if _is_world(rank_enum, backend):
        return world, _WorldGroup(world, known, None)
    if all(len(ranks) == 1 for ranks in rank_enum):
        everyone = [[rank] for rank in range(dist.get_world_size())]
        shared = _shared(known, everyone, backend, False, "one rank")
        return (shared.group if [dist.get_rank()] in rank_enum else None), shared
    shared = _shared(known, rank_enum, backend, connect, group_desc)
    return shared.group, shared


def _shared(
    known: dict[Hashable, SharedGroup],
    rank_enum: list[list[int]],
    backend: str | None,
    connect: bool,
    group_desc: str,
) -> SharedGroup:
    key = (backend, members(rank_enum))
    found = known.get(key)
    if found is None or not found.is_alive():
        group = make_groups(rank_enum, backend, connect=connect, group_desc=group_desc)
        found = known[key] = SharedGroup(group, known, key)
    return found.taken()


def members(rank_enum: list[list[int]]) -> frozenset[tuple[int, ...]]:
    """Return who is together with whom, whatever the order (tuples are faster than sets)."""
    return frozenset(tuple(sorted(ranks)) for ranks in rank_enum)


def _is_world(rank_enum: list[list[int]], backend: str | None) -> bool:
    default = dist.get_backend()
    one_of_all = len(rank_enum) == 1 and len(rank_enum[0]) == dist.get_world_size()
    return one_of_all and backend in (None, default)
