# SPDX-License-Identifier: Apache-2.0
"""The gather bridge beside the installed Megatron-Core's own, where that one works: without CP.

Forward and backward of both in turn within one run, as in ``wall_time``; rows and gradients are
compared bit for bit before. Stock names NCCL as the backend of its groups; here it gets the one
that the launch has.
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.cases import EQUAL_1, FAN_IN_2_1, FAN_OUT_2_1, Pair, TokenBatch
from benchmarks.kinds import stock_bridge
from benchmarks.paths import Bridges, bridges, random_rows
from benchmarks.wall_time import alternate, both
from mimo_colocated.launch.layouts import Layout

FAN_IN_8_1 = Pair(Layout(tp=1, dp=8), Layout(tp=8, dp=1))
FAN_OUT_8_1 = Pair(Layout(tp=8, dp=1), Layout(tp=1, dp=8))
DEFAULT = (FAN_IN_2_1, FAN_IN_8_1, FAN_OUT_2_1, FAN_OUT_8_1, EQUAL_1)
SIZES = ((1024, 64), (4096, 256), (16384, 1024))
# Time over stock's, in every cell.
BOUND = 1.05
COLUMNS = {
    "layout": "layout (encoder/language)",
    "rows": "rows",
    "width": "width",
    "MiB": "MiB",
    "stock_ms": "stock ms",
    "gather_ms": "gather ms",
    "ratio": "ratio",
    "bound": "bound",
}


class _OwnBackend:
    """``torch.distributed``, whose groups have the default backend whatever is asked for."""

    def __getattr__(self, name: str) -> Any:
        return getattr(dist, name)

    def new_subgroups_by_enumeration(self, ranks: Any, backend: Any = None) -> Any:
        """Make the groups; ``backend`` is not heard."""
        return dist.new_subgroups_by_enumeration(ranks)


def measure(pairs: tuple[Pair, ...], quick: bool) -> Iterator[dict[str, Any]]:
    """A cell per pair, rows and width; on all ranks."""
    stock = _load()
    for pair in pairs or DEFAULT:
        with bridges(pair) as made:
            ends = (*made.grids, "images", "language")
            theirs = stock.ColocatedBridgeCommunicator(*ends, dim_mapping={"b": 0, "h": 1})
            for rows, width in SIZES[:2] if quick else SIZES:
                yield _cell(made, theirs, rows, width)
            theirs.destroy()


def _load() -> ModuleType:
    """Stock's module, under a name of its own."""
    path = stock_bridge()
    assert path is not None, "the installed Megatron-Core has no such bridge"
    spec = importlib.util.spec_from_file_location("stock_colocated_communicator", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    module.dist = _OwnBackend()  # type: ignore[attr-defined]
    return module


def _cell(made: Bridges, theirs: Any, rows: int, width: int) -> dict[str, Any]:
    pair, batch = made.pair, TokenBatch.uniform(made.pair, rows)
    held = random_rows(pair, batch, width, torch.float32)
    _compare(made.gather, theirs, held)
    seconds = alternate(
        {
            "stock": both(lambda x, _: theirs.communicate(x), held),
            "gather": both(lambda x, _: made.gather.communicate(x), held),
        }
    )
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    ratio = medians["gather"] / medians["stock"]
    return {
        "layout": str(pair),
        "rows": rows,
        "width": width,
        "MiB": round(rows * width * held.element_size() / 2**20, 2),
        "stock_ms": round(medians["stock"] * 1e3, 2),
        "gather_ms": round(medians["gather"] * 1e3, 2),
        "ratio": round(ratio, 3),
        "bound": BOUND,
        "repetitions": len(seconds["gather"]),
        "passed": ratio <= BOUND,
    }


def _compare(ours: Any, theirs: Any, held: torch.Tensor) -> None:
    """Rows and gradients of both are equal."""
    found = []
    for bridge in (ours, theirs):
        held.grad = None
        moved = bridge.communicate(held)
        values = torch.arange(moved.numel(), device=moved.device, dtype=moved.dtype)
        (moved * values.view_as(moved).remainder(7)).sum().backward()
        found.append((moved.detach(), held.grad))
    assert all(torch.equal(*each) for each in zip(*found, strict=True)), "the bridges differ"
