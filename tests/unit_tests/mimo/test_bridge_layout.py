# SPDX-License-Identifier: Apache-2.0
"""The bridge's integers: worked tables, every pair of layouts against a direct computation, every
error. Pure, no process group."""

from __future__ import annotations

import importlib
import itertools
import subprocess
import sys
from collections.abc import Iterator

import pytest

from megatron.core.hyper_comm_grid import GridShape, HyperCommGrid
from megatron.core.models.mimo.comm.plan.gather_layout import (
    BridgeDirection,
    BridgeLayout,
    SliceInfo,
)

pytestmark = pytest.mark.once

SRC_ORDERS = [("tp", "dp"), ("tp", "cp", "pp", "dp"), ("pp", "tp", "dp", "cp")]
DEST_ORDERS = [("tp", "cp", "dp"), ("cp", "tp", "dp"), ("tp", "cp", "pp", "dp")]
STAGED_ORDERS = [("tp", "cp", "pp", "dp"), ("pp", "cp", "tp", "dp"), ("cp", "pp", "tp", "dp")]


def grid(order: tuple[str, ...] = ("tp", "cp", "dp"), offset: int = 0, **sizes: int) -> GridShape:
    assert set(sizes) <= set(order)
    return GridShape(tuple(sizes.get(name, 1) for name in order), order, offset)


def pair(src: tuple[int, int], dest: tuple[int, int, int], offset: int = 0) -> BridgeLayout:
    return BridgeLayout.from_grids(
        grid(("tp", "dp"), offset, tp=src[0], dp=src[1]),
        grid(("tp", "cp", "dp"), offset, tp=dest[0], cp=dest[1], dp=dest[2]),
        "vision",
        "language",
    )


def factors(n: int, count: int) -> Iterator[tuple[int, ...]]:
    if count == 1:
        yield (n,)
        return
    for first in range(1, n + 1):
        if n % first == 0:
            for rest in factors(n // first, count - 1):
                yield (first, *rest)


def all_pairs(n: int) -> list[tuple[tuple[int, int], tuple[int, int, int]]]:
    return [
        (src, dest)
        for src, dest in itertools.product(factors(n, 2), factors(n, 3))
        if max(src[1], dest[2]) % min(src[1], dest[2]) == 0
    ]


class TestWorkedTables:
    def test_fan_in_with_cp(self) -> None:
        layout = pair((2, 4), (2, 2, 2))
        assert (layout.direction, layout.scale) == (BridgeDirection.FAN_IN, 2)
        assert layout.rank_to_dest_pos == {0: (0, 0), 1: (0, 1), 4: (1, 0), 5: (1, 1)}
        assert list(layout.rank_to_dest_coords) == list(range(8))
        assert ["".join(map(str, c)) for c in layout.rank_to_dest_coords.values()] == (
            ["000", "010", "001", "011", "100", "110", "101", "111"]
        )
        assert layout.rank_to_src_pos == {r: (r // 2, r % 2) for r in range(8)}
        assert layout.gather_groups == ((0, 2), (1, 3), (4, 6), (5, 7))

    def test_fan_out_with_cp(self) -> None:
        layout = pair((4, 2), (1, 2, 4))
        assert (layout.direction, layout.scale) == (BridgeDirection.FAN_OUT, 2)
        assert layout.rank_to_dest_pos == {0: (0, 0), 2: (1, 0), 4: (2, 0), 6: (3, 0)}
        assert layout.rank_to_dest_coords == {r: (r // 2, 0, r % 2) for r in range(8)}
        assert layout.gather_groups == ((0, 2), (1, 3), (4, 6), (5, 7))

    def test_equal(self) -> None:
        layout = pair((4, 2), (2, 2, 2))
        assert (layout.direction, layout.scale) == (BridgeDirection.EQUAL, 1)
        assert layout.gather_groups == ()
        assert layout.slot_slice(5, 7) == SliceInfo(0, 7)

    def test_group_order_is_coarse_dp_then_tp_then_cp(self) -> None:
        assert pair((8, 1), (2, 2, 2)).gather_groups == ((0, 4), (2, 6), (1, 5), (3, 7))
        assert pair((2, 4), (8, 1, 1)).gather_groups == ((0, 2, 4, 6), (1, 3, 5, 7))

    def test_offset_shifts_every_rank(self) -> None:
        layout = pair((2, 2), (1, 2, 2), offset=4)
        assert list(layout.ranks) == [4, 5, 6, 7]
        assert layout.rank_to_dest_pos == {4: (0, 0), 6: (1, 0)}
        fan_in = pair((1, 4), (1, 2, 2), offset=4)
        assert fan_in.gather_groups == ((4, 5), (6, 7))
        assert [fan_in.slot(r) for r in fan_in.ranks] == [0, 1, 0, 1]

    def test_sizes(self) -> None:
        layout = pair((2, 6), (1, 4, 3))
        assert (layout.src_tp_size, layout.src_dp_size) == (2, 6)
        assert (layout.dest_tp_size, layout.dest_cp_size, layout.dest_dp_size) == (1, 4, 3)
        assert (layout.src_name, layout.dest_name, layout.size) == ("vision", "language", 12)


def held_samples(
    sizes: dict[str, int], order: tuple[str, ...], rank: int, batch: int
) -> tuple[list[int], dict[str, int]]:
    """Samples of a global batch that a rank holds, by counting ranks up like an odometer."""
    odometer = dict.fromkeys(order, 0)
    for _ in range(rank):
        for name in order:
            odometer[name] += 1
            if odometer[name] < sizes.get(name, 1):
                break
            odometer[name] = 0
    dp, index = sizes["dp"], odometer["dp"]
    return [s for s in range(batch) if s * dp // batch == index], odometer


@pytest.mark.parametrize("ranks", [1, 2, 4, 6, 8, 12])
@pytest.mark.parametrize("src_order", SRC_ORDERS, ids="-".join)
@pytest.mark.parametrize("dest_order", DEST_ORDERS, ids="-".join)
def test_every_pair_against_a_direct_computation(
    ranks: int, src_order: tuple[str, ...], dest_order: tuple[str, ...]
) -> None:
    batch = 2 * ranks
    for (stp, sdp), (dtp, dcp, ddp) in all_pairs(ranks):
        src_sizes, dest_sizes = {"tp": stp, "dp": sdp}, {"tp": dtp, "cp": dcp, "dp": ddp}
        layout = BridgeLayout.from_grids(
            grid(src_order, **src_sizes), grid(dest_order, **dest_sizes)
        )
        held = {}
        for rank in range(ranks):
            src, at_src = held_samples(src_sizes, src_order, rank, batch)
            dest, at_dest = held_samples(dest_sizes, dest_order, rank, batch)
            held[rank] = (src, dest, at_src, at_dest)
            assert _samples(layout.src_slice(rank, batch)) == src
            assert _samples(layout.dest_slice(rank, batch)) == dest
            assert layout.rank_to_src_pos[rank] == (at_src["dp"], at_src["tp"])
            coords = (at_dest["dp"], at_dest["tp"], at_dest["cp"])
            assert layout.rank_to_dest_coords[rank] == coords
            # The slot: where the finer block begins in the coarser one, in finer blocks.
            fine, coarse = sorted((src, dest), key=len)
            assert layout.slot(rank) == coarse.index(fine[0]) // len(fine)
            own = _samples(layout.slot_slice(rank, len(coarse)))
            assert [coarse[i] for i in own] == fine
        first_cp = {r: (c["dp"], c["tp"]) for r, (_, _, _, c) in held.items() if c["cp"] == 0}
        assert layout.rank_to_dest_pos == first_cp
        _check_groups(layout, held)


@pytest.mark.parametrize("ranks", [2, 8, 12])
@pytest.mark.parametrize("order", STAGED_ORDERS, ids="-".join)
def test_every_pair_with_pipeline_stages(ranks: int, order: tuple[str, ...]) -> None:
    """Stages are copies as CP ranks are, and every stage has a whole set of siblings."""
    for (stp, sdp), (dtp, copies, ddp) in all_pairs(ranks):
        for cp, pp in factors(copies, 2):
            dest_sizes = {"tp": dtp, "cp": cp, "pp": pp, "dp": ddp}
            layout = BridgeLayout.from_grids(
                grid(("tp", "dp"), tp=stp, dp=sdp), grid(order, **dest_sizes)
            )
            batch, firsts = 2 * ranks, {}
            siblings: dict[tuple[int, ...], list[int]] = {}
            for rank in range(ranks):
                mine, at = held_samples(dest_sizes, order, rank, batch)
                assert _samples(layout.dest_slice(rank, batch)) == mine
                assert layout.rank_to_dest_coords[rank] == (at["dp"], at["tp"], at["cp"])
                assert layout.rank_to_dest_stage[rank] == at["pp"]
                if at["cp"] == at["pp"] == 0:
                    firsts[rank] = (at["dp"], at["tp"])
                source = layout.src_slice(rank, batch).start
                siblings.setdefault((source, at["tp"], at["cp"], at["pp"]), []).append(rank)
            assert layout.rank_to_dest_pos == firsts
            assert layout.dest_pp_size == pp
            if layout.direction is BridgeDirection.FAN_OUT:
                assert sorted(map(sorted, siblings.values())) == sorted(
                    map(sorted, layout.gather_groups)
                )


def _samples(part: SliceInfo) -> list[int]:
    return list(range(part.start, part.start + part.size))


def _check_groups(layout: BridgeLayout, held: dict[int, tuple]) -> None:
    """Members' finer blocks, in member order, are just the coarser block; copies do not mix."""
    if layout.direction is BridgeDirection.EQUAL:
        assert layout.gather_groups == ()
        return
    fan_in = layout.direction is BridgeDirection.FAN_IN
    assert sorted(r for group in layout.gather_groups for r in group) == list(held)
    for group in layout.gather_groups:
        assert len(group) == layout.scale
        assert [layout.slot(rank) for rank in group] == list(range(layout.scale))
        fine = [s for rank in group for s in held[rank][0 if fan_in else 1]]
        for rank in group:
            assert fine == held[rank][1 if fan_in else 0]
        copies = {
            held[rank][2]["tp"] if fan_in else (held[rank][3]["tp"], held[rank][3]["cp"])
            for rank in group
        }
        assert len(copies) == 1


class CountingShape(GridShape):
    """A box that counts how often it is asked where a rank is."""

    def coords(self, rank: int) -> dict[str, int]:
        counts[id(self)] = counts.get(id(self), 0) + 1
        return super().coords(rank)


counts: dict[int, int] = {}


def test_16384_ranks_ask_for_each_rank_once_per_side() -> None:
    counts.clear()
    src = CountingShape((1, 16384), ("tp", "dp"))
    dest = CountingShape((8, 8, 256), ("tp", "cp", "dp"))
    layout = BridgeLayout.from_grids(src, dest)
    assert counts == {id(src): 16384, id(dest): 16384}
    assert (layout.scale, len(layout.gather_groups)) == (64, 256)
    assert layout.gather_groups[255] == tuple(range(16320, 16384))
    assert layout.src_slice(16383, 32768) == SliceInfo(32766, 2)
    assert layout.dest_slice(16383, 32768) == SliceInfo(32640, 128)


def test_the_communication_grid_lays_the_same_bridge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    layout = BridgeLayout.from_grids(
        HyperCommGrid([2, 4], ["tp", "dp"]),
        HyperCommGrid([2, 2, 2], ["tp", "cp", "dp"]),
        "vision",
        "language",
    )
    assert layout == pair((2, 4), (2, 2, 2))


def test_layout_is_frozen() -> None:
    layout = pair((2, 4), (2, 2, 2))
    with pytest.raises(AttributeError):
        layout.scale = 3  # type: ignore[misc]
    with pytest.raises(AttributeError):
        layout.slot_slice(0, 4).start = 1  # type: ignore[misc]


def test_needs_no_torch() -> None:
    """The module's own file imports the standard library only."""
    file = sys.modules[BridgeLayout.__module__].__file__
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('layout', {file!r})\n"
        "module = sys.modules['layout'] = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "assert module.BridgeLayout and 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


TP2_DP4 = grid(("tp", "dp"), tp=2, dp=4)


class TestErrors:
    @pytest.mark.parametrize(
        ("src", "dest", "message"),
        [
            (
                TP2_DP4,
                grid(tp=2, cp=2, dp=1),
                r"span same number of ranks: src=8 \(tp=2 dp=4\), dest=4 \(tp=2 cp=2 dp=1\)",
            ),
            (TP2_DP4, grid(offset=8, tp=2, cp=2, dp=2), "same rank offset: src=0, dest=8"),
            (
                grid(("cp", "dp"), dp=8),
                TP2_DP4,
                r"src grid must have 'tp' dimension, .*\['cp', 'dp'",
            ),
            (TP2_DP4, grid(("tp",), tp=8), r"dest grid must have 'dp' dimension, .*\['tp'\]"),
            (
                grid(("tp", "pp", "dp"), tp=2, pp=2, dp=2),
                TP2_DP4,
                "src PP must be 1 .* got 2 in tp=2 pp=2 dp=2",
            ),
            (
                TP2_DP4,
                grid(("tp", "dp", "pp"), dp=2, pp=4),
                r"must nest: rank 1 is in src replica 0 of 4 .* 'dp' after all other dims in .*"
                r"dp_last=True\)\), or use bridge='routed'",
            ),
            (grid(cp=2, tp=2, dp=2), TP2_DP4, "src CP must be 1 .* got 2"),
            (
                TP2_DP4,
                grid(("tp", "ep", "dp"), ep=2, dp=4),
                r"dest EP must be 1 .* got 2 .* Only \('tp', 'cp', 'dp', 'pp'\)",
            ),
            (
                TP2_DP4,
                grid(("tp", "dp", "cp"), tp=2, dp=2, cp=2),
                r"dest grid must have 'cp' before 'dp' in dim_names, got \['tp', 'dp', 'cp'\]",
            ),
            (TP2_DP4, grid(("tp", "dp", "cp"), tp=2, dp=4), "must have 'cp' before 'dp'"),
            (
                grid(("tp", "dp"), tp=2, dp=3),
                grid(tp=3, dp=2),
                r"evenly divisible.* src_dp=3, dest_dp=2.* one of \[1, 2\] or any multiple of 2",
            ),
            (
                TP2_DP4,
                grid(("dp", "tp"), tp=4, dp=2),
                "must nest: rank 1 is in src replica 0 of 4 .* in dest replica 1 of 2",
            ),
            (
                grid(("dp", "tp"), tp=2, dp=4),
                grid(tp=2, dp=4),
                "must nest: rank 1 is in src replica 1 of 4 .* in dest replica 0 of 4",
            ),
        ],
    )
    def test_grids(self, src: GridShape, dest: GridShape, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            BridgeLayout.from_grids(src, dest)

    @pytest.mark.parametrize(
        ("src", "dest", "direction"),
        [((2, 4), (2, 2, 2), "fan_in"), ((4, 2), (1, 2, 4), "fan_out")],
    )
    def test_batch_that_scale_does_not_divide(
        self, src: tuple[int, int], dest: tuple[int, int, int], direction: str
    ) -> None:
        layout = pair(src, dest)
        with pytest.raises(
            ValueError,
            match=rf"vision -> language: batch dim size 7 is not divisible by {direction} scale=2.*"
            r"multiples of 2, e\.g\. 6 or 8",
        ):
            layout.slot_slice(3, 7)
        with pytest.raises(ValueError, match=r"size 1 .* e\.g\. 2 or 2"):
            layout.check_divisible(1)

    def test_global_batch_that_dp_does_not_divide(self) -> None:
        layout = pair((2, 4), (2, 2, 2))
        with pytest.raises(ValueError, match=r"batch 6 is not divisible by the 4 DP .* of vision"):
            layout.src_slice(0, 6)
        assert layout.dest_slice(0, 6) == SliceInfo(0, 3)
        with pytest.raises(
            ValueError, match=r"batch 7 is not divisible by the 2 DP .* of language"
        ):
            layout.dest_slice(0, 7)

    @pytest.mark.parametrize("rank", [-1, 8])
    def test_rank_outside(self, rank: int) -> None:
        layout = pair((2, 4), (2, 2, 2))
        message = f"Rank {rank} is not on the bridge vision -> language; its ranks are 0 to 7"
        for call in (layout.slot, layout.check_rank):
            with pytest.raises(ValueError, match=message):
                call(rank)
        for call in (layout.src_slice, layout.dest_slice, layout.slot_slice):
            with pytest.raises(ValueError, match=message):
                call(rank, 8)


@pytest.mark.parametrize(
    ("older", "now"),
    [
        ("bridge_layout", "plan.gather_layout"),
        ("colocated_communicator", "gather_bridge"),
        ("route_layout", "plan.routed_layout"),
        ("routes", "plan.routes"),
        ("token_runs", "plan.token_runs"),
    ],
)
def test_older_paths_lead_to_the_same_module(older: str, now: str) -> None:
    comm = "megatron.core.models.mimo.comm."
    assert importlib.import_module(comm + older) is importlib.import_module(comm + now)
