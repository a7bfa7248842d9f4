# SPDX-License-Identifier: Apache-2.0
"""A rank makes its own process groups only: how members meet (threads over one store), how many
groups a rank of a large world makes (one process, fake groups), then real groups on 8 ranks whose
histories differ."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.models.mimo.training.groups import create_process_groups, make_grid
from mimo_colocated import phases, process_groups
from mimo_colocated.process_groups import make_groups, meet_members, release_group

LONG, SHORT = timedelta(seconds=30), timedelta(seconds=0.2)


def together(calls: list[Callable[[], Any]]) -> list[Any]:
    """Results of calls that wait for one another; an exception is a result."""

    def caught(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except RuntimeError as error:
            return str(error)

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(caught, calls))


class CountingStore:
    """A store that counts its requests."""

    def __init__(self, store: dist.Store) -> None:
        self.store, self.requests = store, Counter()

    def __getattr__(self, name: str) -> Any:
        self.requests[name] += 1
        return getattr(self.store, name)


def test_members_agree_on_names_that_never_come_again() -> None:
    """Ranks 1 and 2 are in other groups, too, and come to the shared one after those."""
    store = dist.HashStore()

    def history(rank: int) -> list[str]:
        def meet(*ranks: int) -> str:
            return meet_members(store, list(ranks), rank, LONG)

        others = [meet(1, 2) for _ in range(3)] if rank in (1, 2) else []
        alone = [meet(rank) for _ in range(rank)]
        return others + alone + [meet(0, 1, 2, 3) for _ in range(2)]

    names = together([lambda rank=rank: history(rank) for rank in range(4)])
    assert all(own[-2:] == names[0] for own in names)
    assert names[1][:3] == names[2][:3]
    assert all(len(set(own)) == len(own) for own in names)
    # One history per rank: 2 shared names, 3 of the pair, and 0 + 1 + 2 + 3 of single ranks.
    assert len({name for own in names for name in own}) == 2 + 3 + 6


def test_absent_members_are_named_and_late_ones_hear_of_it() -> None:
    store = dist.HashStore()
    calls = [lambda rank=rank: meet_members(store, [1, 3, 5, 8], rank, SHORT) for rank in (3, 5)]
    for rank, told in zip((3, 5), together(calls), strict=True):
        assert told.startswith(
            f"Rank {rank} came to make the process group of ranks [1, 3, 5, 8], but ranks [1, 8] "
            "did not within 0.2 s."
        )
    for late in (8, 1):  # with the second one all have come, but not together
        with pytest.raises(RuntimeError, match=rf"Rank {late} came .* but ranks \[1, 8\] did not"):
            meet_members(store, [1, 3, 5, 8], late, LONG)


def test_requests_of_a_member_do_not_grow_with_the_group() -> None:
    seen = []
    for size in (2, 16):
        stores = [CountingStore(store) for store in [dist.HashStore()] for _ in range(size)]
        calls = [
            lambda rank=rank, store=store, size=size: meet_members(
                store, list(range(size)), rank, LONG
            )
            for rank, store in enumerate(stores)
        ]
        together(calls)
        seen.append(max(store.requests.total() for store in stores))
    assert seen[0] == seen[1] < 10


# -- one process of a large world --------------------------------------------------------------


@contextmanager
def fake_world(rank: int, size: int) -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_timeout_and_options_of_the_caller_reach_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    helper, told = c10d._new_process_group_helper, {}

    @functools.wraps(helper)  # with its signature, which make_groups looks at
    def note(*args: Any, **kwargs: Any) -> Any:
        told.update(kwargs)
        return helper(*args, **{**kwargs, "backend_options": None})

    monkeypatch.setattr(c10d, "_new_process_group_helper", note)
    default, own, options = timedelta(hours=1), timedelta(seconds=7), object()
    monkeypatch.setattr(process_groups, "_timeout_of_the_default_group", lambda: default)
    with fake_world(rank=0, size=2):
        release_group(make_groups([[0, 1]], timeout=own, pg_options=options))
        assert (told["timeout"], told["backend_options"]) == (own, options)
        release_group(make_groups([[0, 1]]))
        assert (told["timeout"], told["backend_options"]) == (default, None)


@pytest.mark.parametrize("pp", [1, 4])
def test_a_rank_makes_as_many_groups_in_a_large_world_as_in_a_small_one(pp: int) -> None:
    made = {}
    for size in (64, 2048):
        with fake_world(rank=size // 2 + 1, size=size):
            grids = [
                make_grid(tp=2, dp=size // 2),
                make_grid(tp=2, cp=2, pp=pp, dp=size // 4 // pp),
            ]
            for grid in grids:
                create_process_groups(grid)
            made[size] = len(c10d._world.pg_map)
            group = grids[0].get_pg("dp")
            assert dist.get_process_group_ranks(group) == list(range(1, size, 2))
            assert dist.get_group_rank(group, size // 2 + 1) == size // 4
    assert made[64] == made[2048]


def test_a_rank_in_no_group_makes_none_and_gives_torch_its_options() -> None:
    with fake_world(rank=3, size=8):
        before = len(c10d._world.pg_map)
        assert make_groups([[0, 1], [5, 2]]) is None
        assert len(c10d._world.pg_map) == before
        group = make_groups([[5, 3], [0]], group_desc="pair", timeout=LONG)
        assert dist.get_process_group_ranks(group) == [3, 5]
        assert (group.group_desc, group.rank(), group.size()) == ("pair", 0, 2)
        release_group(group)
        assert len(c10d._world.pg_map) == before


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ([], "the enumeration of ranks is empty"),
        ([[0, 1], [1, 2]], r"Ranks \[1\] occur twice in \[\[0, 1\], \[1, 2\]\]; groups must not"),
        ([[0, 8], [-1]], r"Ranks \[-1, 8\] are not in the world; its ranks are 0 to 7"),
    ],
)
def test_bad_enumerations(ranks: list[list[int]], message: str) -> None:
    for rank in (0, 5):  # of a group, and of none
        with fake_world(rank=rank, size=8), pytest.raises(ValueError, match=message):
            make_groups(ranks)


@pytest.mark.parametrize("why", ["mpi", "world that makes groups", "other torch"])
def test_all_ranks_go_through_all_groups_where_torch_needs_them(
    why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(
        dist, "new_subgroups_by_enumeration", lambda *a, **k: (None, calls.append((a, k)))
    )
    makes_groups = {"new_group": lambda self: None} if why == "world that makes groups" else {}
    world = type("World", (), makes_groups)()
    pg_map = {world: (dist.Backend("gloo"), None)}
    monkeypatch.setattr(c10d, "_world", SimpleNamespace(default_pg=world, pg_map=pg_map))
    if why == "other torch":
        monkeypatch.setattr(c10d, "_new_process_group_helper", lambda group_name: None)
    backend = "mpi" if why == "mpi" else None
    assert make_groups([[0, 1], [2, 3]], backend, timeout=LONG) is None
    assert calls == [(([[0, 1], [2, 3]],), {"backend": backend, "timeout": LONG})]


def test_nothing_is_split_off_a_default_group_with_a_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A split is a collective of the whole world; the members connect on the device instead."""
    device, seen = torch.device("cuda", 0), []

    def helper(*args: Any, device_id: torch.device | None, backend_options: Any, **kwargs: Any):
        seen.append((device_id, c10d._get_default_group().bound_device_id, kwargs["group_name"]))
        # Connecting waits for members as meeting does, and is said to.
        assert phases.here().wait == phases.Wait("the making", (0, 1), "")
        raise RuntimeError("cannot connect")

    monkeypatch.setattr(process_groups, "_NEEDED_OF_TORCH", set())
    with fake_world(rank=1, size=4):
        monkeypatch.setattr(c10d, "_new_process_group_helper", helper)
        world = c10d._get_default_group()
        world.bound_device_id = device
        for _ in range(2):
            with pytest.raises(RuntimeError, match="cannot connect"):
                make_groups([[0, 1], [2, 3]])
        assert world.bound_device_id == device
    assert [call[:2] for call in seen] == [(device, None)] * 2
    assert seen[0][2] != seen[1][2]


# -- 8 ranks -----------------------------------------------------------------------------------


@pytest.mark.ranks(8)
def test_groups_of_ranks_with_different_histories(rank_device: torch.device) -> None:
    """Rank ``r`` has ``r`` groups more than rank 0; then ranks meet, destroy and meet again."""
    rank = dist.get_rank()
    # Unbound, else NCCL splits them off the world's communicator, which all ranks must enter.
    with process_groups._unbound(dist.group.WORLD):
        kept = [dist.new_group([rank], use_local_synchronization=True) for _ in range(rank)]
    # Two modules on ranks of their own, then one that spans both; each asks for its own groups.
    grids = [HyperCommGrid([2, 2], ["tp", "dp"], rank_offset=first) for first in (0, 4)]
    mine = grids[rank // 4]
    for dims in ("tp", "dp")[: 1 + rank // 4]:
        mine.create_pg(dims)
    across = HyperCommGrid([4, 2], ["tp", "dp"])
    for _ in range(3):
        group = across.create_pg("dp")
        total = torch.tensor(rank, device=rank_device)
        dist.all_reduce(total, group=group)
        assert total.item() == 2 * (rank % 4) + 4
        dist.barrier()
        across.destroy()
    assert (make_groups([[2, 7]]) is None) is (rank not in (2, 7))
    dist.barrier()
    for group in kept:
        release_group(group)
    mine.destroy()


@pytest.mark.ranks(8)
def test_a_rank_that_does_not_come_is_named() -> None:
    rank, ranks = dist.get_rank(), [0, 3, 6]
    if rank in (0, 3):
        with pytest.raises(RuntimeError, match=r"ranks \[6\] did not within 2 s"):
            make_groups([ranks, [1, 2]], timeout=timedelta(seconds=2))
    dist.barrier()
    if rank == 6:
        with pytest.raises(RuntimeError, match=r"Rank 6 came .* ranks \[6\] did not"):
            make_groups([ranks, [1, 2]])
