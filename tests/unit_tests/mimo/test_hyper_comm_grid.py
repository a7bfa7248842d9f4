# SPDX-License-Identifier: Apache-2.0
"""HyperCommGrid, cheapest first: integers against a brute-force oracle and against the installed
stock module, one process with recorded group creation, then real groups on 8 ranks."""

from __future__ import annotations

import importlib.util
import itertools
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist

import megatron.core
from megatron.core.hyper_comm_grid import GridShape, HyperCommGrid
from mimo_colocated.process_groups import release_group

BOXES = [
    ((8,), ("dp",)),
    ((2, 4), ("tp", "dp")),
    ((2, 3, 2), ("tp", "cp", "dp")),
    ((2, 3, 1, 4), ("tp", "cp", "pp", "dp")),
    ((3, 1, 2, 2, 2), ("dp", "pp", "cp", "tp", "ep")),
]


def brute_force_groups(
    shape: tuple[int, ...], names: tuple[str, ...], dims: tuple[str, ...], offset: int
) -> list[list[int]]:
    """Groups over ``dims`` by comparing every rank's digits; ranks ascend inside a group."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for place in range(math.prod(shape)):
        digits, rest = [], place
        for size in shape:
            digits.append(rest % size)
            rest //= size
        # Most significant digit first, so that sorted keys are in the order of the other dims.
        key = tuple(
            d for d, name in reversed(list(zip(digits, names, strict=True))) if name not in dims
        )
        groups.setdefault(key, []).append(offset + place)
    return [groups[key] for key in sorted(groups)]


def dim_subsets(names: tuple[str, ...]) -> list[tuple[str, ...]]:
    return [s for n in range(1, len(names) + 1) for s in itertools.permutations(names, n)]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "128")


@pytest.fixture
def created(monkeypatch: pytest.MonkeyPatch, world: None) -> list[tuple[Any, dict[str, Any]]]:
    """Records group creation; each call hands out a new object as the rank's group."""
    calls: list[tuple[Any, dict[str, Any]]] = []

    def record(ranks: list[list[int]], **kwargs: Any) -> tuple[object, list[object]]:
        calls.append((ranks, kwargs))
        return object(), []

    monkeypatch.setattr(dist, "new_subgroups_by_enumeration", record)
    return calls


@pytest.mark.parametrize(("shape", "names"), BOXES)
@pytest.mark.parametrize("offset", [0, 5])
def test_rank_enum_is_the_brute_force_one_for_any_order_of_dims(
    world: None, shape: tuple[int, ...], names: tuple[str, ...], offset: int
) -> None:
    grid = HyperCommGrid(list(shape), list(names), rank_offset=offset)
    for dims in dim_subsets(names):
        assert grid.get_rank_enum(list(dims)) == brute_force_groups(shape, names, dims, offset)
        assert grid.get_rank_enum(dims[0]) == grid.get_rank_enum([dims[0]])


@pytest.mark.parametrize(("shape", "names"), BOXES)
def test_coords_invert_the_rank_formula(
    world: None, shape: tuple[int, ...], names: tuple[str, ...]
) -> None:
    grid = HyperCommGrid(list(shape), list(names), rank_offset=3)
    for rank in range(3, 3 + math.prod(shape)):
        coords = grid.coords(rank)
        assert list(coords) == list(names)
        assert all(0 <= coords[name] < size for name, size in zip(names, shape, strict=True))
        strides = [math.prod(shape[:axis]) for axis in range(len(shape))]
        assert rank == 3 + sum(coords[n] * stride for n, stride in zip(names, strides, strict=True))


def test_gen_rank_enum_keeps_the_given_order_last_dim_fastest(world: None) -> None:
    grid = HyperCommGrid([2, 2, 2], ["a", "b", "c"])
    assert grid._gen_rank_enum(["a", "b"]) == [[0, 2, 1, 3], [4, 6, 5, 7]]
    assert grid._gen_rank_enum(["b", "a"]) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert grid._gen_rank_enum(["c"]) == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_order_dims_slowest_first(world: None) -> None:
    grid = HyperCommGrid([2, 2, 2], ["tp", "cp", "dp"])
    assert grid._order_dims_for(grid.dim_names, ["cp", "dp"]) == (["dp", "cp"], "dp-cp")
    assert grid._order_dims_for(["dp", "cp"], ["cp", "dp"]) == (["cp", "dp"], "cp-dp")
    assert grid._order_dims_for(grid.dim_names, "tp") == (["tp"], "tp")
    assert grid._order_dims(["tp", "dp"]) == (["dp", "tp"], "dp-tp")


def test_dim_size_is_one_for_an_absent_dim(world: None) -> None:
    grid = HyperCommGrid([2, 4], ["tp", "dp"])
    assert [grid.dim_size(name) for name in ("tp", "dp", "cp")] == [2, 4, 1]


def test_attributes_are_copies(world: None) -> None:
    shape, names = [2, 4], ["tp", "dp"]
    grid = HyperCommGrid(shape, names, rank_offset=8, backend="some")
    shape[0], names[0] = 7, "x"
    assert (grid.shape, grid.dim_names) == ([2, 4], ["tp", "dp"])
    assert (grid.rank_offset, grid.size, grid.backend) == (8, 8, "some")


def stock_module() -> ModuleType:
    """The installed Megatron-Core's own module, loaded from its file past the import hook."""
    ours = Path(sys.modules[HyperCommGrid.__module__].__file__ or "")
    files = [Path(folder) / "hyper_comm_grid.py" for folder in megatron.core.__path__]
    (stock,) = [file for file in files if file.is_file() and not file.samefile(ours)]
    spec = importlib.util.spec_from_file_location("stock_hyper_comm_grid", stock)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("shape", "names"), BOXES)
def test_agrees_with_the_installed_stock_grid(
    world: None, shape: tuple[int, ...], names: tuple[str, ...]
) -> None:
    stock = stock_module().HyperCommGrid(list(shape), list(names), rank_offset=2)
    ours = HyperCommGrid(list(shape), list(names), rank_offset=2)
    assert (ours.size, ours.shape, ours.dim_names) == (stock.size, stock.shape, stock.dim_names)
    for dims in dim_subsets(names):
        assert ours.get_rank_enum(list(dims)) == stock.get_rank_enum(list(dims))
        assert ours._gen_rank_enum(list(dims)) == stock._gen_rank_enum(list(dims))


def test_stock_bridge_imports_this_grid() -> None:
    from megatron.core.pipeline_parallel import bridge_communicator

    assert bridge_communicator.HyperCommGrid is HyperCommGrid


class TestConstructionErrors:
    @pytest.mark.parametrize(
        ("shape", "names", "message"),
        [
            ([2, 4], ["tp"], r"len\(shape\) \[2, 4\] != len\(dim_names\) \['tp'\]: 2 .* 1 names"),
            ([2, 0], ["tp", "dp"], r"shape must be positive ints, got \[2, 0\]"),
            ([2, -4], ["tp", "dp"], r"shape must be positive ints, got \[2, -4\]"),
            ([2, 4.0], ["tp", "dp"], r"shape must be positive ints, got \[2, 4\.0\]"),
            ([2, 4], ["tp", "tp"], r"Grid has duplicate dim_names: \['tp', 'tp'\]"),
        ],
    )
    def test_shape(self, world: None, shape: list[int], names: list[str], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            HyperCommGrid(shape, names)

    def test_negative_offset(self, world: None) -> None:
        with pytest.raises(ValueError, match="rank_offset must be non-negative, got -1"):
            HyperCommGrid([2], ["tp"], rank_offset=-1)

    def test_over_sized(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WORLD_SIZE", "8")
        HyperCommGrid([2, 2], ["tp", "dp"], rank_offset=4)
        with pytest.raises(
            RuntimeError,
            match=r"Grid shape \[2, 2\] is over sized with world size 8 and rank offset 5: .* 4 ",
        ):
            HyperCommGrid([2, 2], ["tp", "dp"], rank_offset=5)

    def test_world_size_from_torch_when_the_variable_is_unset(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        monkeypatch.setattr(dist, "is_initialized", lambda: True)
        monkeypatch.setattr(dist, "get_world_size", lambda: 6)
        assert HyperCommGrid([6], ["dp"]).size == 6
        with pytest.raises(RuntimeError, match="over sized with world size 6"):
            HyperCommGrid([7], ["dp"])

    def test_unknown_world_size_says_what_to_set(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        monkeypatch.setattr(dist, "is_initialized", lambda: False)
        with pytest.raises(
            RuntimeError, match=r"(?s)Cannot determine world size.*Set WORLD_SIZE, or call .*init_"
        ):
            HyperCommGrid([2], ["tp"])

    @pytest.mark.parametrize("rank", [7, 16])
    def test_coords_outside_the_grid(self, world: None, rank: int) -> None:
        grid = HyperCommGrid([2, 4], ["tp", "dp"], rank_offset=8)
        with pytest.raises(
            ValueError, match=rf"Rank {rank} is not in the grid tp=2 x dp=4.*8 to 15"
        ):
            grid.coords(rank)

    def test_pure_shape_checks_itself(self) -> None:
        with pytest.raises(ValueError, match="rank_offset must be non-negative"):
            GridShape((2,), ("tp",), -2)
        with pytest.raises(ValueError, match=r"shape must be positive ints, got \(0,\)"):
            GridShape((0,), ("tp",))


class TestGroups:
    def test_created_once_and_handed_out(self, created: list[Any]) -> None:
        grid = HyperCommGrid([2, 2, 2], ["tp", "cp", "dp"], backend="some")
        group = grid.create_pg(["cp", "dp"], group_desc="grads")
        assert created == [
            ([[0, 2, 4, 6], [1, 3, 5, 7]], {"backend": "some", "group_desc": "grads"})
        ]
        assert grid.get_pg(["dp", "cp"]) is group
        assert grid._pgs == {"dp-cp": group}

    def test_second_creation(self, created: list[Any]) -> None:
        grid = HyperCommGrid([2, 2, 2], ["tp", "cp", "dp"])
        grid.create_pg(["cp", "dp"])
        with pytest.raises(
            KeyError, match=r"Process group \['dp', 'cp'\] has already been created"
        ):
            grid.create_pg(["dp", "cp"])
        assert len(created) == 1

    def test_missing(self, created: list[Any]) -> None:
        grid = HyperCommGrid([2, 4], ["tp", "dp"])
        with pytest.raises(
            KeyError,
            match=r"Process group for dp-tp hasn't been created. Call create_pg first",
        ):
            grid.get_pg(["tp", "dp"])
        assert created == []

    @pytest.mark.parametrize("method", ["create_pg", "get_pg", "get_rank_enum"])
    def test_unknown_dim(self, created: list[Any], method: str) -> None:
        grid = HyperCommGrid([2, 4], ["tp", "dp"])
        for dims in ("cp", ["tp", "cp"]):
            with pytest.raises(
                ValueError, match=r"'cp' is not in view 'base' with dim_names \['tp'"
            ):
                getattr(grid, method)(dims)
        assert created == []

    def test_dim_given_twice(self, created: list[Any]) -> None:
        with pytest.raises(ValueError, match=r"given twice in \['tp', 'tp'\]"):
            HyperCommGrid([2, 4], ["tp", "dp"]).create_pg(["tp", "tp"])
        assert created == []

    def test_order_dims_of_an_unknown_name(self, world: None) -> None:
        grid = HyperCommGrid([2], ["tp"])
        with pytest.raises(ValueError, match="'x' is not in list"):
            grid._order_dims_for(grid.dim_names, ["x"])

    def test_destroy_each_group_once(
        self, monkeypatch: pytest.MonkeyPatch, created: list[Any]
    ) -> None:
        ended: list[object] = []
        monkeypatch.setattr(dist, "destroy_process_group", ended.append)
        grid = HyperCommGrid([2, 4], ["tp", "dp"])
        groups = [grid.create_pg("tp"), grid.create_pg("dp")]
        grid._pgs["alias"] = groups[0]
        grid._pgs["outside"] = None
        grid._pgs["not a member"] = dist.GroupMember.NON_GROUP_MEMBER
        grid.destroy()
        grid.destroy()
        assert ended == groups
        assert grid._pgs == {}

    def test_a_destroyed_grid_makes_its_groups_anew(
        self, monkeypatch: pytest.MonkeyPatch, created: list[Any]
    ) -> None:
        monkeypatch.setattr(dist, "destroy_process_group", lambda group: None)
        grid = HyperCommGrid([2, 4], ["tp", "dp"])
        before = grid.get_or_create_pg("tp")
        grid.destroy()
        assert grid.get_or_create_pg("tp") is not before
        assert len(created) == 2


    @pytest.mark.parametrize("small_first", [True, False])
    def test_groups_of_some_ranks_are_no_twins_of_those_of_all(
        self, created: list[Any], small_first: bool
    ) -> None:
        """Or ranks outside them would have no group."""
        grid = HyperCommGrid([2, 4], ["tp", "dp"])
        some, every = [[0], [2]], [[rank] for rank in range(8)]
        for number, ranks in enumerate([some, every] if small_first else [every, some]):
            grid.keep_pg(("own", (str(number),)), ranks)
        assert [ranks for ranks, _ in created] == ([some, every] if small_first else [every, some])


class TestViews:
    @staticmethod
    def grid() -> HyperCommGrid:
        grid = HyperCommGrid([2, 2, 1, 4], ["tp", "cp", "pp", "dp"], rank_offset=4)
        grid.register_view(
            "expert", [1, 8, 1, 2], ["expt_tp", "ep", "pp", "expt_dp"], shared_dims=["pp"]
        )
        return grid

    def test_enumerations(self, world: None) -> None:
        grid = self.grid()
        assert grid.get_rank_enum("ep", view="expert") == [
            list(range(4, 12)),
            list(range(12, 20)),
        ]
        assert grid.get_rank_enum("expt_dp", view="expert") == [[r, r + 8] for r in range(4, 12)]
        assert grid.get_rank_enum("dp", view="base") == grid.get_rank_enum("dp")
        assert (grid._views["expert"].shape, grid._views["expert"].shared_dims) == (
            [1, 8, 1, 2],
            ["pp"],
        )

    def test_shared_dims_reuse_the_base_group(self, created: list[Any]) -> None:
        grid = self.grid()
        group = grid.create_pg("pp")
        assert grid.get_pg("pp", view="expert") is group
        with pytest.raises(KeyError, match="Process group pp has already been created"):
            grid.create_pg("pp", view="expert")
        assert list(grid._pgs) == ["pp"]

    def test_a_group_that_is_there_is_used_again_in_each_view(self, created: list[Any]) -> None:
        grid = self.grid()
        shared, own = grid.create_pg("pp"), grid.create_pg("ep", view="expert")
        assert grid.get_or_create_pg("pp", view="expert") is shared
        assert grid.get_or_create_pg(["ep"], view="expert") is own
        assert grid.get_or_create_pg("expt_dp", view="expert") not in (None, shared, own)
        assert list(grid._pgs) == ["pp", ("expert", ("ep",)), ("expert", ("expt_dp",))]

    def test_private_dims_have_their_own(self, created: list[Any]) -> None:
        grid = self.grid()
        base = grid.create_pg(["pp", "dp"])
        own = grid.create_pg(["pp", "expt_dp"], view="expert")
        assert base is not own
        assert grid._pgs == {"dp-pp": base, ("expert", ("expt_dp", "pp")): own}
        with pytest.raises(KeyError, match="for view 'expert' has already been created"):
            grid.create_pg(["expt_dp", "pp"], view="expert")
        with pytest.raises(
            KeyError, match=r"ep for view 'expert' hasn't been created. Call create_"
        ):
            grid.get_pg("ep", view="expert")

    def test_several_shared_dims_use_the_base_key(self, created: list[Any]) -> None:
        grid = HyperCommGrid([2, 2, 2], ["tp", "cp", "dp"])
        grid.register_view("same", [2, 2, 2], ["tp", "cp", "dp"], ["tp", "dp"])
        group = grid.create_pg(["tp", "dp"], view="same")
        assert grid.get_pg(["dp", "tp"]) is group
        assert list(grid._pgs) == ["dp-tp"]

    def test_unknown_view(self, world: None) -> None:
        with pytest.raises(
            KeyError, match=r"View 'x' is not registered. Registered views: \['base'"
        ):
            self.grid().get_rank_enum("tp", view="x")

    def test_unknown_dim_of_a_view(self, world: None) -> None:
        with pytest.raises(ValueError, match="'tp' is not in view 'expert' with dim_names"):
            self.grid().get_rank_enum("tp", view="expert")

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (("base", [16], ["x"]), "View 'base' is already registered"),
            (("expert", [16], ["x"]), r"already registered; registered are \['base', 'expert'\]"),
            (("v", [16], ["x", "y"]), r"len\(shape\) \[16\] != len\(dim_names\) \['x', 'y'\]"),
            (("v", [4, 4], ["x", "x"]), r"View 'v' has duplicate dim_names: \['x', 'x'\]"),
            (("v", [16, 0], ["x", "y"]), r"View 'v' shape must be positive ints, got \[16, 0\]"),
            (("v", [8], ["x"]), "'v' shape .8. has size 8, but the grid size is 16"),
            (("v", [16], ["x"], ["x", "x"]), "View 'v' has duplicate shared_dims"),
            (("v", [16], ["x"], ["x"]), "Shared dim 'x' of view 'v' is not in the base view"),
            (("v", [16], ["x"], ["tp"]), "Shared dim 'tp' of view 'v' is not in the view's dim_n"),
            (
                ("v", [8, 2], ["x", "tp"], ["tp"]),
                r"Shared dim 'tp' has different membership across views: base enumeration \[\[4, 5",
            ),
            (
                ("v", [2, 4, 2], ["tp", "dp", "cp"], ["tp", "dp"]),
                "Shared dim 'dp' has different membership",
            ),
        ],
    )
    def test_errors(self, world: None, args: tuple[Any, ...], message: str) -> None:
        grid = self.grid()
        with pytest.raises(ValueError, match=message):
            grid.register_view(*args)
        assert list(grid._views) == ["base", "expert"]

    def test_dims_that_agree_one_by_one_agree_together(self, world: None) -> None:
        grid = HyperCommGrid([2, 3, 4, 5], ["a", "b", "c", "d"])
        grid.register_view(
            "v", [2, 1, 3, 2, 2, 1, 5], ["a", "y", "b", "c1", "c2", "z", "d"], ["d", "a", "b"]
        )
        for dims in dim_subsets(("a", "b", "d")):
            assert grid.get_rank_enum(list(dims), view="v") == grid.get_rank_enum(list(dims))


@pytest.mark.ranks(8)
def test_real_groups_have_the_enumerated_members(rank_device: torch.device) -> None:
    grid = HyperCommGrid([2, 2, 2], ["tp", "cp", "dp"])
    assert grid.is_current_rank_in_grid()
    for dims in ("tp", "cp", "dp", ["cp", "dp"], ["tp", "cp", "dp"]):
        group = grid.create_pg(dims)
        mine = next(ranks for ranks in grid.get_rank_enum(dims) if dist.get_rank() in ranks)
        assert dist.get_process_group_ranks(group) == mine
        total = torch.tensor(dist.get_rank(), device=rank_device)
        dist.all_reduce(total, group=group)
        assert total.item() == sum(mine)
        assert grid.get_pg(dims) is group
    grid.destroy()
    grid.destroy()


@pytest.mark.ranks(8)
def test_ranks_outside_take_part_in_creation_and_have_no_group() -> None:
    grid = HyperCommGrid([2, 2], ["tp", "dp"], rank_offset=2)
    inside = 2 <= dist.get_rank() < 6
    assert grid.is_current_rank_in_grid() is inside
    assert (grid.create_pg("dp") is not None) is inside
    # A group that one rank destroys while another still connects fails there.
    dist.barrier()
    grid.destroy()


@pytest.mark.ranks(8)
def test_release_of_a_group_that_went_with_the_world_or_not() -> None:
    group, _ = dist.new_subgroups_by_enumeration([[0, 1, 2, 3], [4, 5, 6, 7]])
    dist.barrier()
    release_group(group)
    with pytest.raises(ValueError, match=r"(?i)invalid process group"):
        release_group(group)
