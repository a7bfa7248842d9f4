# SPDX-License-Identifier: Apache-2.0
"""Process groups that their members make among themselves, whatever the size of the world.

``make_groups`` makes this rank's of several groups, ``release_group`` ends one. This module is
beside Megatron-Core's names, not under them, because ``megatron.core.hyper_comm_grid`` needs it
while ``megatron.core`` itself is being imported.
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from mimo_colocated import phases

logger = logging.getLogger(__name__)

# What making a group under a name of one's own hands to torch (2.6 and newer have it all).
_NEEDED_OF_TORCH = {"group_name", "backend_options", "timeout", "device_id", "group_desc"}
# Registered by torch's testing module only.
_FAKE_BACKEND = getattr(dist.Backend, "FAKE", None)
_COMPLETE = "complete"
_unmet = itertools.count()


def make_groups(
    rank_enum: list[list[int]],
    backend: str | None = None,
    *,
    connect: bool = True,
    **kwargs: Any,
) -> dist.ProcessGroup | None:
    """Make this rank's group among several; all ranks of the world call it, in the same order.

    A rank makes its own group only, with the other members, so what a rank does here does not
    grow with the number of groups. Where torch needs every rank for every group (MPI, and default
    groups that make groups themselves), all go through all of them.

    Args:
        rank_enum: ranks of each group, none in two of them.
        backend: their backend; ``None`` is the default group's.
        connect: whether NCCL connects members at once, where the default group has a device. Else
            it does in the group's first collective, which all of them enter, so one that is not
            used takes no memory of the device. Not for sends and receives: every pair would connect
            for itself. Gloo connects at once always, as waiting it can deadlock (seen on 8 ranks
            with torch 2.13), and so does all where torch needs every rank.
        kwargs: ``timeout``, ``pg_options``, ``group_desc``, as for
            ``torch.distributed.new_subgroups_by_enumeration``. ``timeout`` also bounds the wait
            for the other members; it is the default group's if none is given, not torch's 30
            minutes (NCCL: 10), in which a job does not learn that a rank is lost.

    Returns:
        This rank's group, ``None`` if it is in none of them.

    Raises:
        ValueError: on all ranks: no group, a rank that the world lacks, or one that occurs twice.
        RuntimeError: not all members came in time; the message names those that did not.
    """
    timeout = kwargs.get("timeout") or _timeout_of_the_default_group()
    if timeout is not None:
        kwargs["timeout"] = timeout
    pg: Any
    if _members_suffice(backend):
        pg = _make_own_group(rank_enum, backend, connect, **kwargs)
    else:
        pg, _ = dist.new_subgroups_by_enumeration(rank_enum, backend=backend, **kwargs)
    logger.debug("Created process groups with ranks %s", rank_enum)
    if isinstance(pg, dist.ProcessGroup) and torch.device("cpu") in pg._device_types:
        # On CPU, members connect to one another while the group is made. One that has returned
        # and then destroys the group breaks the connecting of a slower one, so wait for all.
        dist.all_reduce(torch.zeros(1), group=pg)
    return pg


def _timeout_of_the_default_group() -> timedelta | None:
    """What ``init_process_group`` was given; ``None``, torch's own, if that cannot be seen."""
    world: Any = c10d._world.default_pg
    for device in getattr(world, "_device_types", ()):
        try:
            timeout = world._get_backend(device).options._timeout
        except (AttributeError, RuntimeError):  # a backend without options
            continue
        if isinstance(timeout, timedelta):
            return timeout
    return None


def _members_suffice(backend: str | None) -> bool:
    """Whether members can make a group without the rest of the world; the same on all ranks."""
    world = c10d._world.default_pg
    if world is None:
        return False  # torch says so, in its words
    name = backend or c10d._world.pg_map[world][0]
    makes_groups_itself = callable(getattr(world, "new_group", None))
    return (
        name != dist.Backend.MPI
        and not makes_groups_itself
        and set(inspect.signature(c10d._new_process_group_helper).parameters) >= _NEEDED_OF_TORCH
    )


def _make_own_group(
    rank_enum: list[list[int]],
    backend: str | None,
    connect: bool,
    timeout: timedelta | None = None,
    pg_options: Any = None,
    group_desc: str | None = None,
) -> Any:
    """``torch.distributed.new_group`` by the members alone, under a name that they agree on.

    Torch names such groups after how many groups the rank has at the moment, which differs
    between ranks that take part in different things, and which comes again after groups were
    destroyed: members then look for one another in different places, or at addresses of the past.
    """
    ranks = _own_ranks(rank_enum, dist.get_rank(), dist.get_world_size())
    if ranks is None:
        return None
    world = c10d._get_default_group()
    default_backend, store = c10d._world.pg_map[world]
    # Torch declares a str here, and wants a Backend.
    own_backend: Any = dist.Backend(backend or default_backend)
    timeout = timeout or c10d._get_default_timeout(own_backend)
    # A fake group has no other members to meet, and its store keeps nothing.
    meet = _meet_nobody if own_backend == _FAKE_BACKEND else meet_members
    # Connecting may wait as meeting does: a member may be lost in between.
    with phases.waiting("the making", ranks, group_desc or ""), _unbound(world) as device:
        group_name: Any = meet(store, ranks, world.rank(), timeout)
        pg, _ = c10d._new_process_group_helper(
            len(ranks),
            ranks.index(world.rank()),
            ranks,
            own_backend,
            store,
            group_name=group_name,
            backend_options=pg_options,
            timeout=timeout,
            # With a device NCCL connects at once.
            device_id=device if connect else None,
            group_desc=group_desc,
        )
    c10d._world.pg_group_ranks[pg] = {rank: place for place, rank in enumerate(ranks)}
    return pg


@contextmanager
def _unbound(world: dist.ProcessGroup) -> Iterator[torch.device | None]:
    """The device that is bound to the default group, and for a while none bound.

    From a default group with a device, communicators of new groups are split off, which all ranks
    of the world have to enter. Without, members connect as those of a default group do.
    """
    device, world.bound_device_id = world.bound_device_id, None
    try:
        yield device
    finally:
        world.bound_device_id = device


def _own_ranks(rank_enum: list[list[int]], rank: int, world_size: int) -> list[int] | None:
    """The group that a rank is in, ascending as torch numbers members.

    Raises:
        ValueError: as :func:`make_groups`.
    """
    if not rank_enum:
        raise ValueError("No groups to make: the enumeration of ranks is empty")
    everyone = [member for ranks in rank_enum for member in ranks]
    outside = [member for member in everyone if not 0 <= member < world_size]
    if outside:
        raise ValueError(
            f"Ranks {sorted(set(outside))} are not in the world; its ranks are 0 to "
            f"{world_size - 1}"
        )
    if len(set(everyone)) != len(everyone):
        twice = sorted(member for member, times in Counter(everyone).items() if times > 1)
        raise ValueError(f"Ranks {twice} occur twice in {rank_enum}; groups must not overlap")
    return next((sorted(ranks) for ranks in rank_enum if rank in ranks), None)


def meet_members(store: dist.Store, ranks: list[int], rank: int, timeout: timedelta) -> str:
    """Wait for the other members of a group; a name for the group, new and the same on all.

    Arrivals are counted in the store, so members need no memory of earlier groups: of ``n``
    members, arrivals ``0 .. n - 1`` are the first meeting of these ranks, the next ``n`` the
    second. A constant number of requests per member.

    Args:
        store: seen by all members.
        ranks: the members, in the same order on all.
        rank: this one.
        timeout: for the others to come.

    Raises:
        RuntimeError: some did not come, with their ranks; late ones hear of it when they do.
    """
    base = "hyper_comm_grid/" + hashlib.sha256(repr(ranks).encode()).hexdigest()[:32]
    meeting = (store.add(f"{base}/arrivals", 1) - 1) // len(ranks)
    name = f"{base}/{meeting}"
    store.set(f"{name}/member/{rank}", "here")
    if store.add(f"{name}/count", 1) == len(ranks):
        _settle(store, name, _COMPLETE)
    try:
        store.wait([f"{name}/settled"], timeout)
    except RuntimeError:
        missing = [r for r in ranks if not store.check([f"{name}/member/{r}"])]
        if missing:
            _settle(store, name, repr(missing))
    verdict = store.get(f"{name}/settled").decode()
    if verdict != _COMPLETE:
        raise RuntimeError(
            f"Rank {rank} came to make the process group of ranks {ranks}, but ranks {verdict} "
            f"did not within {timeout.total_seconds():g} s. Every rank makes its groups in the "
            "same order: look at what these ranks do instead, or raise the timeout."
        )
    return name


def _settle(store: dist.Store, name: str, verdict: str) -> None:
    """End a meeting; the first verdict counts, for those who come later, too."""
    if store.add(f"{name}/settlers", 1) == 1:
        store.set(f"{name}/settled", verdict)


def _meet_nobody(store: dist.Store, ranks: list[int], rank: int, timeout: timedelta) -> str:
    return f"hyper_comm_grid/{next(_unmet)}"


def is_member(pg: dist.ProcessGroup | None) -> bool:
    """Return whether ``pg`` is a group that this rank is in, not torch's marker for others."""
    return pg is not None and pg is not dist.GroupMember.NON_GROUP_MEMBER


def release_group(pg: dist.ProcessGroup | None) -> None:
    """Destroy a process group if this rank is in it; nothing is left to do after the world's end.

    Args:
        pg: a group, ``None``, or torch's marker for a group that this rank is not in.
    """
    if not is_member(pg):
        return
    try:
        dist.destroy_process_group(pg)
    except (AssertionError, ValueError):
        # Destroying the default group ends all groups, so ours may be gone with it.
        if dist.is_initialized():
            raise
