# SPDX-License-Identifier: Apache-2.0
"""Process groups of a module on 8 ranks, against ranks found by comparing coordinates."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.models.mimo.training.groups import (
    EXPERT_VIEW,
    create_process_groups,
    make_grid,
)
from megatron.core.process_groups_config import ProcessGroupCollection

pytestmark = [pytest.mark.ranks(8), pytest.mark.once]

# Field -> dims along which its members differ.
DENSE = {
    "tp": {"tp"},
    "cp": {"cp"},
    "pp": {"pp"},
    "dp": {"dp"},
    "dp_cp": {"dp", "cp"},
    "intra_dp_cp": {"dp", "cp"},
    "mp": {"tp", "pp"},
    "tp_cp": {"tp", "cp"},
    "tp_dp_cp": {"tp", "cp", "dp"},
    "intra_dist_opt": {"tp", "cp", "dp", "pp"},
}
# Without an expert view: one expert group per rank, experts sharded and replicated like the rest.
DENSE_EXPERTS = {
    "ep": set(),
    "expt_tp": {"tp"},
    "tp_ep": {"tp"},
    "tp_ep_pp": {"tp", "pp"},
    "expt_dp": {"dp", "cp"},
    "intra_expt_dp": {"dp", "cp"},
}
EXPERT = {
    "ep": {"ep"},
    "expt_tp": {"expt_tp"},
    "tp_ep": {"expt_tp", "ep"},
    "tp_ep_pp": {"expt_tp", "ep", "pp"},
    "expt_dp": {"expt_dp"},
    "intra_expt_dp": {"expt_dp"},
}
# One is enough to fail in about one of ten runs where nobody waits.
REPEATS = 20
LAYOUTS = [
    ([2, 1, 4, 1], ["tp", "cp", "dp", "pp"], 0),
    ([2, 2, 2, 1], ["tp", "cp", "dp", "pp"], 0),
    ([1, 2, 2, 2], ["tp", "cp", "dp", "pp"], 0),
    ([2, 1, 1, 4], ["tp", "cp", "dp", "pp"], 0),
    ([2, 2, 2, 1], ["dp", "pp", "cp", "tp"], 0),
    ([4, 2], ["tp", "dp"], 0),
    ([2, 2, 2], ["tp", "dp", "pp"], 0),
    ([2, 2], ["tp", "dp"], 4),
    ([1, 2, 1, 2], ["tp", "cp", "dp", "pp"], 2),
]


def members(
    shape: list[int], names: list[str], offset: int, dims: set[str], rank: int
) -> list[int] | None:
    """Ranks whose coordinates differ from ``rank``'s in ``dims`` only; None outside the grid."""
    places = {}
    for place in range(_product(shape)):
        rest, coordinates = place, {}
        for size, name in zip(shape, names, strict=True):
            rest, coordinates[name] = divmod(rest, size)
        places[place + offset] = coordinates
    if rank not in places:
        return None
    fixed = {name for name in names if name not in dims}
    return [r for r, c in places.items() if all(c[n] == places[rank][n] for n in fixed)]


def _product(sizes: list[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


def ranks_of(group: dist.ProcessGroup | None) -> list[int] | None:
    return None if group is None else dist.get_process_group_ranks(group)


@pytest.fixture(params=LAYOUTS, ids=lambda p: "".join(map(str, p[0])) + "".join(p[1]) + str(p[2]))
def layout(request: pytest.FixtureRequest) -> tuple[list[int], list[str], int]:
    return request.param


@pytest.fixture
def grid(layout: tuple[list[int], list[str], int]) -> Iterator[HyperCommGrid]:
    shape, names, offset = layout
    grid = HyperCommGrid(shape, names, rank_offset=offset)
    yield grid
    dist.barrier()
    grid.destroy()


def test_members_are_those_of_the_coordinates(
    grid: HyperCommGrid, layout: tuple[list[int], list[str], int]
) -> None:
    collection, rank = create_process_groups(grid), dist.get_rank()
    for field, dims in {**DENSE, **DENSE_EXPERTS}.items():
        assert ranks_of(getattr(collection, field)) == members(*layout, dims, rank), field


def test_embedding_groups_join_first_and_last_stage(
    grid: HyperCommGrid, layout: tuple[list[int], list[str], int]
) -> None:
    collection, rank = create_process_groups(grid), dist.get_rank()
    stages = members(*layout, {"pp"}, rank)
    if stages is None:
        assert collection.embd is None
        assert collection.pos_embd is None
        return
    ends = sorted({stages[0], stages[-1]})
    assert ranks_of(collection.embd) == (ends if rank in ends else None)
    assert ranks_of(collection.pos_embd) == ([stages[0]] if rank == stages[0] else None)


def test_a_second_call_returns_the_same_groups(grid: HyperCommGrid) -> None:
    first, second = create_process_groups(grid), create_process_groups(grid)
    for field in ("embd", "pos_embd", *DENSE, *DENSE_EXPERTS):
        assert getattr(first, field) is getattr(second, field), field


def test_dims_of_size_1_make_no_groups_of_their_own(grid: HyperCommGrid) -> None:
    """A group costs memory and connections: one per set of ranks, under all its names.

    But for what is left running: gradients do not queue behind what layers wait for.
    """
    collection = create_process_groups(grid)
    running = {"pp", "dp", "dp_cp", "intra_dp_cp"}
    for fields in (running, DENSE.keys() - running):
        groups = {id(g): g for f in fields if (g := getattr(collection, f)) is not None}
        members = [tuple(ranks_of(group)) for group in groups.values()]
        assert len(set(members)) == len(members)


def test_groups_may_be_destroyed_as_soon_as_they_are_made() -> None:
    """A member that has gone on must not break the connecting of a slower one."""
    for _ in range(REPEATS):
        grid = make_grid(tp=2, dp=4)
        create_process_groups(grid)
        grid.destroy()


def test_the_grid_destroys_every_group(
    layout: tuple[list[int], list[str], int], own_groups: None
) -> None:
    shape, names, offset = layout
    known = set(dist.distributed_c10d._world.pg_map)
    grid = HyperCommGrid(shape, names, rank_offset=offset)
    create_process_groups(grid)
    # That of one rank is anybody's.
    made = set(dist.distributed_c10d._world.pg_map) - known
    assert (len(made) > 1) is grid.is_current_rank_in_grid()
    dist.barrier()
    grid.destroy()
    assert set(dist.distributed_c10d._world.pg_map) == known


def test_every_field_that_stock_code_asks_for_is_set(grid: HyperCommGrid) -> None:
    collection = create_process_groups(grid)
    fields = {f.name for f in dataclasses.fields(ProcessGroupCollection)}
    # 0.19's groups for rematerialised weights: its own collections leave them unset, too.
    optional = {f for f in fields if "remat" in f or f.endswith("_ag")}
    assert fields - optional <= set(vars(collection))
    assert set(vars(collection)) <= fields
    unset = {f for f in fields - optional if getattr(collection, f) is None}
    if grid.is_current_rank_in_grid() and grid.dim_size("pp") == 1:
        assert unset == {"hcp", "inter_dist_opt"}


def test_stock_set_ups_accept_the_collection(grid: HyperCommGrid) -> None:
    """Both bases check a collection's fields before DDP and the optimizer use it."""
    collection = create_process_groups(grid)
    if not grid.is_current_rank_in_grid():
        assert collection.dp_cp is None
        return
    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=True)
    config = SimpleNamespace(context_parallel_size=grid.dim_size("cp"))
    chunk = SimpleNamespace(ddp_config=ddp_config, config=config)
    for_ddp = ProcessGroupCollection.setup_process_groups_for_ddp(collection, config, ddp_config)
    for_optimizer = ProcessGroupCollection.setup_process_groups_for_optimizer(
        collection, [chunk], use_gloo_process_groups=False
    )
    assert for_ddp["dp_cp_group"] is collection.dp_cp
    assert for_optimizer["mp_group"] is collection.mp
    assert for_optimizer["intra_dist_opt_group"] is collection.intra_dist_opt


def test_expert_groups_come_from_the_expert_view() -> None:
    shape, names = [2, 2, 1, 2], ["tp", "cp", "dp", "pp"]
    expert_shape, expert_names = [1, 2, 2, 2], ["expt_tp", "ep", "expt_dp", "pp"]
    grid = HyperCommGrid(shape, names)
    grid.register_view(EXPERT_VIEW, expert_shape, expert_names, shared_dims=["pp"])
    try:
        collection, rank = create_process_groups(grid), dist.get_rank()
        again = create_process_groups(grid)
        for field, dims in DENSE.items():
            expected = members(shape, names, 0, dims, rank)
            assert ranks_of(getattr(collection, field)) == expected, field
        for field, dims in EXPERT.items():
            expected = members(expert_shape, expert_names, 0, dims, rank)
            assert ranks_of(getattr(collection, field)) == expected, field
            assert getattr(again, field) is getattr(collection, field), field
    finally:
        dist.barrier()
        grid.destroy()


def test_groups_that_exist_already_are_taken() -> None:
    grid = make_grid(tp=2, cp=2, dp=2)
    try:
        made = grid.create_pg(["dp", "cp"])
        assert grid.get_or_create_pg(["cp", "dp"]) is made
        assert create_process_groups(grid).dp_cp is made
    finally:
        dist.barrier()
        grid.destroy()


def test_make_grid_puts_tp_fastest_and_pp_slowest() -> None:
    grid = make_grid(tp=2, cp=2, pp=2)
    assert grid.get_rank_enum("tp")[0] == [0, 1]
    assert grid.get_rank_enum("cp")[0] == [0, 2]
    assert grid.get_rank_enum("pp")[0] == [0, 4]
    assert make_grid(dp=4, rank_offset=4).get_rank_enum("dp") == [[4, 5, 6, 7]]
