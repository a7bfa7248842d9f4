# SPDX-License-Identifier: Apache-2.0
"""What the asynchronous exchange hides: issued, text embedded meanwhile, then waited for.

In backward the gradients are sent off, the text embeddings' gradient is computed, then the
received gradients are waited for. The same work with each wait right after its start is the
comparison. One step of each is written as a trace for chrome://tracing or ui.perfetto.dev.

Gloo's transport is threads on the cores that compute, so on a busy machine nothing can be hidden
behind anything. A second measurement therefore models a transport of its own: an exchange takes at
least ``_WIRE`` seconds from its start, during which it needs no core.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from benchmarks.cases import FAN_IN_2_2, FAN_IN_4_4, Pair, TokenBatch
from benchmarks.paths import RoutedPath, bridges, random_rows, rank_device, synchronize
from benchmarks.wall_time import alternate
from megatron.core.models.mimo.comm.exchange import Exchange

_ROWS, _WIDTH, _TEXT, _VOCABULARY = 6144, 512, 3, 512
_WIRE = 0.02
# Overlapped over sequential time, at most, with the modelled transport. What computes meanwhile
# is one embedding lookup and its gradient, so not all of the wire's time can be hidden.
BOUND = 0.95
COLUMNS = {
    "layout": "layout (encoder/language)",
    "wire_ms": "modelled wire, ms",
    "sequential_ms": "wait at once, ms",
    "overlapped_ms": "overlapped, ms",
    "ratio": "ratio",
    "sequential_wait_ms": "of it waiting",
    "overlapped_wait_ms": "of it waiting",
    "hidden": "waiting hidden",
    "trace": "trace",
}


def measure(pairs: tuple[Pair, ...], quick: bool, results: Path) -> Iterator[dict[str, Any]]:
    """A cell per pair, and a trace of rank 0; on all ranks."""
    for pair in pairs or ((FAN_IN_4_4,) if quick else (FAN_IN_4_4, FAN_IN_2_2)):
        with bridges(pair) as made:
            rows = _ROWS // 4 if quick else _ROWS
            batch = TokenBatch.uniform(pair, rows, _TEXT)
            held = random_rows(pair, batch, _WIDTH, torch.float32)
            vocabulary = torch.randn(
                _VOCABULARY, _WIDTH, device=held.device, requires_grad=True
            )
            runs = {
                name: _once(RoutedPath(made, batch, overlap), held, vocabulary)
                for name, overlap in (("sequential", False), ("overlapped", True))
            }
            for wire in (0.0, _WIRE):
                yield _cell(pair, runs, wire, results)


def _cell(
    pair: Pair, runs: dict[str, Callable[[], None]], wire: float, results: Path
) -> dict[str, Any]:
    waits: dict[str, list[float]] = {name: [] for name in runs}
    with _waits_timed(wire) as waited:
        seconds = alternate({name: _noting(run, waited, waits[name]) for name, run in runs.items()})
    total = {name: statistics.median(each) for name, each in seconds.items()}
    waiting = {name: _mean(statistics.median(each)) for name, each in waits.items()}
    name = str(pair).replace("/", "_to_").replace(",", "_").replace("=", "")
    wired = "_wire" if wire else ""
    path = results / f"overlap_{name}{wired}.trace.json.gz"
    with _waits_timed(wire):
        _trace(runs, path)
    ratio = total["overlapped"] / total["sequential"]
    hidden = 1 - waiting["overlapped"] / max(waiting["sequential"], 1e-9)
    return {
        "layout": str(pair),
        "wire_ms": round(wire * 1e3),
        "sequential_ms": round(total["sequential"] * 1e3, 2),
        "overlapped_ms": round(total["overlapped"] * 1e3, 2),
        "ratio": round(ratio, 3),
        "sequential_wait_ms": round(waiting["sequential"] * 1e3, 2),
        "overlapped_wait_ms": round(waiting["overlapped"] * 1e3, 2),
        "hidden": round(hidden, 3),
        "trace": path.name,
        "passed": ratio <= BOUND if wire else None,
    }


def _once(path: RoutedPath, held: torch.Tensor, vocabulary: torch.Tensor) -> Callable[[], None]:
    def embed(places: torch.Tensor) -> torch.Tensor:
        with torch.profiler.record_function("text embedding"):
            return torch.nn.functional.embedding(places % len(vocabulary), vocabulary)

    def run() -> None:
        held.grad = vocabulary.grad = None
        local = path(held, embed)
        local.backward(torch.ones_like(local))

    return run


@contextlib.contextmanager
def _waits_timed(wire: float) -> Iterator[list[float]]:
    """Seconds of every wait for an exchange, forward and backward, as a growing list.

    An exchange ends ``wire`` seconds after its start, or later.
    """
    waited: list[float] = []
    ends: dict[Exchange, float] = {}
    start_it, wait_for_it = Exchange.start, Exchange.wait

    def start(exchange: Exchange, *arguments: Any) -> None:
        start_it(exchange, *arguments)
        ends[exchange] = time.perf_counter() + wire

    def wait(exchange: Exchange) -> None:
        started = time.perf_counter()
        with torch.profiler.record_function("wait for the exchange"):
            wait_for_it(exchange)
            time.sleep(max(0.0, ends.pop(exchange, started) - time.perf_counter()))
        waited.append(time.perf_counter() - started)

    with mock.patch.multiple(Exchange, start=start, wait=wait):
        yield waited


def _noting(
    run: Callable[[], None], waited: list[float], found: list[float]
) -> Callable[[], None]:
    """``run``, with the seconds that it has waited appended to ``found``."""

    def noted() -> None:
        waited.clear()
        run()
        found.append(sum(waited))

    return noted


def _trace(runs: dict[str, Callable[[], None]], path: Path) -> None:
    """One step of each on rank 0's time line, named; all ranks take part."""
    with torch.profiler.profile(acc_events=True) as profiler:
        for name, run in runs.items():
            dist.barrier()
            with torch.profiler.record_function(name):
                run()
                synchronize()
    if dist.get_rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp.gz")
        profiler.export_chrome_trace(str(temporary))
        temporary.replace(path)


def _mean(value: float) -> float:
    mine = torch.tensor(value, dtype=torch.float64, device=rank_device())
    dist.all_reduce(mine)
    return float(mine) / dist.get_world_size()
