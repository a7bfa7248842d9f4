# SPDX-License-Identifier: Apache-2.0
"""Planning and set-up for thousands of ranks, in one process: ``python -m benchmarks.scale``.

Each cell is one world size, measured in a process of its own, forked when all is imported:

* ``layout_s``: both bridges' layouts, of all ranks.
* ``plan_s``: routes of one rank, which is what a training process plans per batch.
* ``all_plans_s``: routes of every rank of the world, one exchange group after another.
* ``one_group_s``: routes of one rank when all ranks of the world exchange with one another.
* ``stages_s``: the same where the language model's two stages are the outermost axis of its grid,
  at CP 8, with 96,000 rows (1,500 images) in each replica's 131,072 tokens: 768,000 on 128 ranks.
* ``balance_s``: the items of that one group assigned to the encoder replicas.
* ``setup_s``, ``groups``: process groups of both modules and both bridges on one rank of a fake
  world, and how many groups the rank made.

Bounds: layouts and every rank's routes in 2 s and 500 MB at the largest size, the same number of
groups at every size. Growth is shown as the ratio to the size before; 4 is linear.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron.core.hyper_comm_grid import GridShape
from megatron.core.models.mimo.comm.plan.balance import plan_balance
from megatron.core.models.mimo.comm.plan.gather_layout import BridgeLayout
from megatron.core.models.mimo.comm.plan.routed_layout import RouteLayout
from megatron.core.models.mimo.comm.plan.routes import GroupRoutes, plan_routes
from megatron.core.models.mimo.comm.plan.token_runs import TokenRuns

SIZES, QUICK = (128, 1024, 4096, 16384), (128, 1024)
SECONDS, MEGABYTES = 2.0, 500
# Encoder TP 2, language model TP 2 and CP 8; one sample per language replica.
_TP, _CP, _ITEMS, _ITEM_ROWS, _SEQ_LEN = 2, 8, 4, 64, 512
COLUMNS = {
    "world": "ranks",
    "layout_s": "layouts s",
    "plan_s": "routes of a rank s",
    "all_plans_s": "of all ranks s",
    "one_group_s": "of a rank, one group s",
    "one_group_MB": "its peak MB",
    "stages_s": "of a rank, stages outermost s",
    "balance_s": "balance s",
    "plan_MB": "peak MB of planning",
    "setup_s": "set-up s",
    "setup_MB": "its peak MB",
    "groups": "groups",
    "growth": "growth",
    "passed": "",
}


def run(quick: bool = False) -> Iterator[dict[str, Any]]:
    """A cell per world size, ascending; ``growth`` and ``groups`` are held against the first."""
    before: dict[str, Any] | None = None
    for world in QUICK if quick else SIZES:
        cell = {"world": world, **_apart(_plan, world), **_apart(_set_up, world)}
        planning = cell["layout_s"] + cell["all_plans_s"]
        cell["growth"] = None
        cell["passed"] = planning < SECONDS and cell["plan_MB"] < MEGABYTES
        if before is not None:
            earlier = before["layout_s"] + before["all_plans_s"]
            cell["growth"] = round(planning / earlier, 2)
            cell["passed"] &= cell["groups"] == before["groups"]
        before = cell
        yield cell


def _apart(measure: Callable[[int], dict[str, Any]], world: int) -> dict[str, Any]:
    """The result of ``measure(world)`` in a process of its own."""
    context = multiprocessing.get_context("fork")
    with context.Pool(1) as pool:
        return pool.apply(measure, (world,))


def _grids(world: int) -> tuple[tuple[list[int], list[str]], tuple[list[int], list[str]]]:
    """(shape, dim names) of the encoder and of the language model."""
    dp = world // (_TP * _CP)
    return ([_TP, world // _TP], ["tp", "dp"]), ([_TP, _CP, dp], ["tp", "cp", "dp"])


def _tokens() -> TokenRuns:
    """Items with text between them."""
    starts = np.arange(_ITEMS) * (_SEQ_LEN // _ITEMS)
    runs = np.stack([starts, np.full(_ITEMS, _ITEM_ROWS)], axis=1)
    return TokenRuns(1, _SEQ_LEN, runs)


def _plan(world: int) -> dict[str, Any]:
    memory, watch, result = _peak_megabytes(), _Watch(), {}
    src, dest = (GridShape(tuple(shape), tuple(names)) for shape, names in _grids(world))
    BridgeLayout.from_grids(src, dest)
    layout = RouteLayout.from_grids(src, dest)
    result["layout_s"] = watch.lap()
    tokens, replicas = [_tokens()], _CP
    held = [_ITEMS * _ITEM_ROWS // replicas] * replicas
    plan_routes(layout, world // 2 + 1, tokens, held)
    result["plan_s"] = watch.lap()
    for group in layout.groups():
        routes = GroupRoutes(group, tokens, held)
        for rank in group.ranks.tolist():
            routes.plan(rank)
    result["all_plans_s"] = watch.lap()
    result["plan_MB"] = round(_peak_megabytes() - memory, 1)

    layout = RouteLayout.from_grids(src, dest, one_group=True)
    replicas = world // _TP
    items = np.full(layout.dest_dp_size * _ITEMS, _ITEM_ROWS)
    counts = np.bincount(np.arange(items.size) * 7 % replicas, minlength=replicas)
    watch.lap()
    plan = plan_balance(items, counts)
    result["balance_s"] = watch.lap()
    plan_routes(layout, world // 2 + 1, tokens * layout.dest_dp_size, plan.held_rows())
    result["one_group_s"] = watch.lap()
    result["one_group_MB"] = round(_peak_megabytes() - memory, 1)

    src = GridShape((_TP, world // _TP), ("tp", "dp"))
    dest = GridShape((1, _CP, world // (2 * _CP), 2), ("tp", "cp", "dp", "pp"))
    layout, images = RouteLayout.from_grids(src, dest), np.arange(1500)
    runs = np.stack([images * (131_072 // 1500), np.full(1500, 64)], axis=1)
    stage_tokens = [TokenRuns(1, 131_072, runs)] * layout.dest_dp_size
    shares = [layout.dest_dp_size * 96_000 // layout.src_dp_size] * layout.src_dp_size
    watch.lap()
    plan_routes(layout, world // 2 + 1, stage_tokens, shares)
    result["stages_s"] = watch.lap()
    return result


def _set_up(world: int) -> dict[str, Any]:
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron.core.hyper_comm_grid import HyperCommGrid
    from megatron.core.models.mimo.comm.gather_bridge import ColocatedBridgeCommunicator
    from megatron.core.models.mimo.comm.routed_bridge import RoutedBridge
    from megatron.core.models.mimo.training.groups import create_process_groups

    memory, watch = _peak_megabytes(), _Watch()
    dist.init_process_group("fake", store=FakeStore(), rank=world // 2 + 1, world_size=world)
    src, dest = (HyperCommGrid(shape, names) for shape, names in _grids(world))
    for grid in (src, dest):
        create_process_groups(grid)
    bridges = [make(src, dest) for make in (ColocatedBridgeCommunicator, RoutedBridge)]
    assert len(bridges) == 2
    return {
        "setup_s": watch.lap(),
        "setup_MB": round(_peak_megabytes() - memory, 1),
        "groups": len(dist.distributed_c10d._world.pg_map) - 1,  # less the default group
    }


class _Watch:
    def __init__(self) -> None:
        self._last = time.process_time()

    def lap(self) -> float:
        """CPU seconds since the last lap; one thread works, and other processes do not count."""
        now = time.process_time()
        last, self._last = self._last, now
        return round(now - last, 4)


def _peak_megabytes() -> float:
    """Largest memory of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write JSON; 1 if a bound is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--quick", action="store_true", help=f"world sizes {QUICK}")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of the JSON")
    options = parser.parse_args(argv)
    cells = []
    for cell in run(options.quick):
        cells.append(cell)
        verdict = "PASS" if cell["passed"] else "FAIL"
        shown = (f"{k} {v}" for k, v in cell.items() if k != "passed")
        print(verdict, *shown, sep="  ", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "scale.json"
    content = {"command": "python -m benchmarks.scale", "cells": cells}
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"written to {path}")
    return int(not all(cell["passed"] for cell in cells))


if __name__ == "__main__":
    sys.exit(main())
