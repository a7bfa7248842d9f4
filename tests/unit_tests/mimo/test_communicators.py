# SPDX-License-Identifier: Apache-2.0
"""How many communicators a rank has: as integers, and as 8 ranks make them."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from megatron.core.hyper_comm_grid import HyperCommGrid, box_of
from megatron.core.models.mimo.comm.routed_bridge import RoutedBridge
from megatron.core.models.mimo.training.groups import EXPERT_VIEW, create_process_groups, make_grid
from mimo_colocated import process_groups, shared_groups
from mimo_colocated.communicators import Communicator, Lane, communicators
from mimo_colocated.grid_shape import GridShape
from mimo_colocated.process_groups import make_groups, release_group

Sizes = dict[str, dict[str, int]]
# The first is the README's.
LAYOUTS: list[Sizes] = [
    {"images": {"tp": 2, "dp": 4}, "language": {"tp": 2, "cp": 2, "dp": 2}},
    {"images": {"dp": 8}, "language": {"dp": 8}},
    {"images": {"tp": 2, "dp": 4}, "language": {"tp": 2, "pp": 2, "dp": 2}},
    {"images": {"dp": 8}, "audio": {"tp": 4, "dp": 2}, "language": {"tp": 4, "cp": 2}},
    {"images": {"dp": 8}, "language": {"tp": 2, "dp": 4, "ep": 2, "expt_tp": 1}},
    {"language": {"tp": 1, "cp": 2, "pp": 4}},
]


def listed(grids: dict[str, HyperCommGrid]) -> list[Communicator]:
    experts = {n: g._views[EXPERT_VIEW].box for n, g in grids.items() if EXPERT_VIEW in g._views}
    return communicators({n: box_of(g) for n, g in grids.items()}, experts)


def test_the_reference_layout_has_six_that_connect(monkeypatch: pytest.MonkeyPatch) -> None:
    """The world, both modules' TP, CP, the gradients of each; DP and TP x CP wait for a use."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    found = listed({name: make_grid(**sizes) for name, sizes in LAYOUTS[0].items()})
    assert [(each.ranks, each.owner) for each in found if each.connects] == [
        (tuple(range(8)), ""),
        ((0, 1), ""),
        ((0, 2, 4, 6), "images"),
        ((0, 2), ""),
        ((0, 2, 4, 6), "language"),
    ]
    assert [each.ranks for each in found if not each.connects] == [(0, 4), (0, 1, 2, 3)]


def test_modules_never_share_what_their_gradients_go_over() -> None:
    """Buckets of two modules are reduced when each is ready: ranks need not have one order."""
    box = GridShape((1, 1, 8, 1), ("tp", "cp", "dp", "pp"))
    found = communicators({"images": box, "audio": box, "language": box})
    assert [each.owner for each in found] == ["", "images", "audio", "language"]
    assert {each.ranks for each in found} == {tuple(range(8))}


# -- 8 ranks -----------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def nothing_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever groups the tests before this one in its world have left."""
    monkeypatch.setattr(shared_groups, "_of_world", WeakKeyDictionary())


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[int, ...], bool, str]]:
    """Members, whether NCCL would connect at once, and name of every group asked of torch."""
    helper, seen = c10d._new_process_group_helper, []

    @contextmanager
    def bound(world: Any) -> Iterator[torch.device]:
        yield torch.device("cuda", 0)

    @functools.wraps(helper)  # with its signature, which make_groups looks at
    def note(size: int, rank: int, ranks: list[int], *args: Any, **kwargs: Any) -> Any:
        seen.append((tuple(ranks), kwargs.pop("device_id") is not None, kwargs["group_name"]))
        return helper(size, rank, ranks, *args, **kwargs)

    monkeypatch.setattr(process_groups, "_unbound", bound)
    monkeypatch.setattr(c10d, "_new_process_group_helper", note)
    return seen


@pytest.fixture
def ended() -> Iterator[list[Any]]:
    """What is destroyed in the end, by all ranks together."""
    things: list[Any] = []
    yield things
    dist.barrier()
    for each in things:
        each.destroy()


def as_the_readme(ended: list[Any]) -> dict[str, HyperCommGrid]:
    grids = {name: make_grid(**sizes) for name, sizes in LAYOUTS[0].items()}
    for grid in grids.values():
        create_process_groups(grid)
    bridge = RoutedBridge(grids["images"], grids["language"], "images", "language")
    ended += [*grids.values(), bridge]
    return grids


@pytest.mark.ranks(8)
def test_the_readmes_layout(made: list[Any], ended: list[Any]) -> None:
    """At most 8 on each rank, the world's and those that wait for a use among them."""
    as_the_readme(ended)
    several = [each for each in made if len(each[0]) > 1]
    assert len(made) - len(several) == 1  # of one rank
    assert 1 + sum(connects for _, connects, _ in several) == 6
    assert 1 + len(several) == 8
    told: list[Any] = [None] * 8
    dist.all_gather_object(told, several)
    sizes = Counter(len(ranks) for ranks, _, _ in {each for own in told for each in own})
    # TP 4, CP 4, DP 4 of two; both modules' gradients 2 + 2, TP x CP 2, exchange 2 of four.
    assert sizes == {2: 12, 4: 8}


@pytest.mark.ranks(8)
def test_control_grids_that_share_nothing_have_more(
    made: list[Any], ended: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def own(rank_enum: Any, backend: Any, *, connect: bool, group_desc: str) -> Any:
        shared = shared_groups._shared({}, rank_enum, backend, True, group_desc)
        return shared.group, shared

    monkeypatch.setattr("megatron.core.hyper_comm_grid.share_groups", own)
    as_the_readme(ended)
    assert 1 + sum(connects and len(ranks) > 1 for ranks, connects, _ in made) > 8


@pytest.mark.ranks(8)
@pytest.mark.parametrize("sizes", LAYOUTS, ids=lambda sizes: "-".join(sizes) + str(len(sizes)))
def test_the_planner_counts_what_the_first_rank_makes(
    sizes: Sizes, made: list[Any], ended: list[Any]
) -> None:
    grids = {name: make_grid(**each) for name, each in sizes.items()}
    for grid in grids.values():
        create_process_groups(grid)
    ended += grids.values()
    (_, *expected) = listed(grids)
    several = [(ranks, connects) for ranks, connects, _ in made if len(ranks) > 1]
    if dist.get_rank() == 0:
        assert several == [(each.ranks, each.connects) for each in expected]
    assert len(several) <= len(expected)


@pytest.mark.ranks(8)
def test_a_group_that_waits_is_a_group(rank_device: torch.device) -> None:
    """Who asks for its size, rank or members waits for nobody, and its first use connects it."""
    grid = make_grid(tp=2, cp=2, dp=2)
    group = create_process_groups(grid).tp_cp
    rank = dist.get_rank()
    if rank == 3:
        assert dist.get_process_group_ranks(group) == [0, 1, 2, 3]
        assert (group.size(), group.rank()) == (4, 3)
    total = torch.tensor(rank, device=rank_device)
    dist.all_reduce(total, group=group)
    assert total.item() == (6 if rank < 4 else 22)
    dist.barrier()
    grid.destroy()


@pytest.mark.ranks(8)
def test_who_asks_says_whether_a_group_connects(made: list[Any], ended: list[Any]) -> None:
    grid = make_grid(tp=2, dp=4)
    ended.append(grid)
    grid.get_or_create_pg("tp", connect=False)
    pairs = [[rank, rank + 4] for rank in range(4)]
    grid.keep_pg(("own", ("pairs",)), pairs, lane=Lane.BESIDE, connect=False)
    everyone = make_groups([list(range(8))], connect=False)
    assert [connects for _, connects, _ in made] == [False] * 3
    dist.barrier()
    release_group(everyone)


@pytest.mark.ranks(8)
def test_shared_groups_end_with_their_last_grid(rank_device: torch.device) -> None:
    known = set(c10d._world.pg_map)
    grids = [make_grid(tp=2, dp=4), make_grid(tp=2, cp=2, dp=2)]
    first, second = (create_process_groups(grid) for grid in grids)
    assert first.tp is second.tp
    assert first.pp is second.pp is first.cp
    assert first.intra_dist_opt is second.intra_dist_opt is dist.group.WORLD
    assert first.dp_cp is not second.dp_cp
    dist.barrier()
    grids[0].destroy()
    total = torch.ones((), device=rank_device)
    for group in (second.tp, second.pp, second.intra_dist_opt):
        dist.all_reduce(total, group=group)
    assert total.item() == 2 * 1 * 8
    dist.barrier()
    grids[1].destroy()
    grids[1].destroy()
    assert set(c10d._world.pg_map) == known
    # What is gone is made anew.
    again = create_process_groups(grids[0])
    assert again.tp is not first.tp
    dist.barrier()
    grids[0].destroy()


@pytest.mark.ranks(8)
def test_a_group_that_somebody_destroyed_is_not_handed_out() -> None:
    grids = [make_grid(tp=2, dp=4), make_grid(tp=2, cp=2, dp=2)]
    gone = create_process_groups(grids[0]).tp
    dist.barrier()
    dist.destroy_process_group(gone)
    assert create_process_groups(grids[1]).tp is not gone
    dist.barrier()
    grids[1].destroy()
    for group in {id(g): g for g in grids[0]._pgs.values() if g is not gone}.values():
        if group is not dist.group.WORLD and group in c10d._world.pg_map:
            release_group(group)
