# SPDX-License-Identifier: Apache-2.0
"""Wall time of forward + backward, routed over gather, from encoder rows to the cut sequence.

The two bridges take turns within one run, so what else the machine does hits both. A repetition
takes as long as its slowest rank; the ratio is that of the medians. Forward and backward are timed
each by itself: between them the language model runs. The routed bridge has its guard on every
exchange, as a model has it: announced before the encoders run and settled while the language model
does, which is outside of what is timed. What these two messages take by themselves, with nothing to
hide behind, is timed too, and so is the guard where plans are compared at the exchange.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.cases import (
    EQUAL_1,
    EQUAL_2,
    FAN_IN_2_1,
    FAN_IN_2_2,
    FAN_IN_4_4,
    FAN_OUT_2_2,
    Pair,
    TokenBatch,
)
from benchmarks.paths import (
    Bridges,
    GatherPath,
    RoutedPath,
    bridges,
    no_text,
    random_rows,
    rank_device,
    synchronize,
)

DEFAULT = (FAN_IN_4_4, FAN_IN_2_2, EQUAL_2, FAN_OUT_2_2, FAN_IN_2_1, EQUAL_1)
SIZES = ((1024, 64), (1024, 1024), (4096, 256), (16384, 64), (16384, 1024), (65536, 64))
# 256 MiB per language replica, 8 GiB on 8 ranks of one machine: for the first pair only.
_LARGEST = (65536, 1024)
_QUICK = ((1024, 64), (4096, 256))
# The bounds: with CP and more than a MiB of payload, and everywhere else.
BOUND, BOUND_ELSEWHERE, LARGE = 0.6, 1.1, 2**20
# Seconds that a cell may take, and repetitions of each bridge at least and at most.
_SECONDS, _REPETITIONS = 2.0, (5, 100)
Path = Callable[[torch.Tensor, Any], torch.Tensor]
Run = Callable[[], None]
COLUMNS = {
    "layout": "layout (encoder/language)",
    "rows": "rows",
    "width": "width",
    "MiB": "MiB",
    "gather_ms": "gather ms",
    "routed_ms": "routed ms",
    "ratio": "ratio",
    "bound": "bound",
    "at_exchange_ratio": "compared at the exchange",
    "messages_ms": "both messages alone, ms",
}


def measure(pairs: tuple[Pair, ...], quick: bool) -> Iterator[dict[str, Any]]:
    """A cell per pair, rows and width; on all ranks."""
    for number, pair in enumerate(pairs or (DEFAULT[:1] if quick else DEFAULT)):
        sizes = _QUICK if quick else SIZES if number else (*SIZES, _LARGEST)
        with bridges(pair) as made:
            for rows, width in sizes:
                yield _cell(made, rows, width)


def bound(pair: Pair, payload: int) -> float:
    """The largest ratio allowed for the rows of one language replica of ``payload`` bytes."""
    return BOUND if pair.language.cp >= 2 and payload > LARGE else BOUND_ELSEWHERE


def _cell(made: Bridges, rows: int, width: int) -> dict[str, Any]:
    pair, batch = made.pair, TokenBatch.uniform(made.pair, rows)
    payload = rows * width * torch.float32.itemsize
    held = random_rows(pair, batch, width, torch.float32)
    routed = RoutedPath(made, batch)
    announce = functools.partial(routed.announce, held)
    seconds = alternate(
        {
            "gather": both(GatherPath(made, batch), held),
            "routed": both(routed, held, announce, routed.settle),
            "at_exchange": both(routed, held),
            "messages": lambda: _messages(routed, held),
        }
    )
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    ratio, allowed = medians["routed"] / medians["gather"], bound(pair, payload)
    return {
        "layout": str(pair),
        "rows": rows,
        "width": width,
        "MiB": round(payload / 2**20, 2),
        "gather_ms": round(medians["gather"] * 1e3, 2),
        "routed_ms": round(medians["routed"] * 1e3, 2),
        "ratio": round(ratio, 3),
        "bound": allowed,
        "at_exchange_ratio": round(medians["at_exchange"] / medians["gather"], 3),
        "messages_ms": round(medians["messages"] * 1e3, 2),
        "repetitions": len(seconds["gather"]),
        "passed": ratio <= allowed,
    }


@dataclass(frozen=True)
class Parts:
    """A run whose parts are timed each by itself.

    Attributes:
        parts: what is called in turn, on all ranks, and whether its time counts.
    """

    parts: tuple[tuple[Run, bool], ...]


def both(
    path: Path, held: torch.Tensor, before: Run = lambda: None, between: Run = lambda: None
) -> Parts:
    """Forward and backward, with what runs before them and between them untimed."""
    gradient: list[torch.Tensor] = []
    fused: list[torch.Tensor] = []

    def prepare() -> None:
        held.grad = None
        before()

    def forward() -> None:
        fused[:] = [path(held, no_text)]

    def wait() -> None:
        if not gradient:
            gradient.append(torch.ones_like(fused[0]))
        between()

    def backward() -> None:
        fused.pop().backward(gradient[0])

    return Parts(((prepare, False), (forward, True), (wait, False), (backward, True)))


def _messages(routed: RoutedPath, held: torch.Tensor) -> None:
    """What the guard says, with nothing between its messages."""
    routed.announce(held)
    routed.bridge.confirm(routed.plan, held)
    routed.settle()


def alternate(
    runs: Mapping[str, Run | Parts],
    seconds: float = _SECONDS,
    repetitions: tuple[int, int] = _REPETITIONS,
) -> dict[str, list[float]]:
    """Seconds of each run, taking turns: per repetition those of the slowest rank.

    Args:
        runs: name -> what is timed, on all ranks.
        seconds: of all together, about.
        repetitions: of each at least and at most.
    """
    for run in runs.values():
        _timed(run)  # what is allocated and connected once
    slowest = torch.tensor(sum(_timed(run) for run in runs.values()), dtype=torch.float64)
    dist.all_reduce(on_device := slowest.to(rank_device()), op=dist.ReduceOp.MAX)
    low, high = repetitions
    count = min(high, max(low, int(seconds / float(on_device))))
    # The order turns too: whoever comes first finds other caches.
    order = [list(runs), list(reversed(runs))]
    found: dict[str, list[float]] = {name: [] for name in runs}
    for repetition in range(count):
        for name in order[repetition % 2]:
            found[name].append(_timed(runs[name]))
    table = torch.tensor([found[name] for name in runs], dtype=torch.float64).to(rank_device())
    dist.all_reduce(table, op=dist.ReduceOp.MAX)
    return dict(zip(runs, table.tolist(), strict=True))


def _timed(run: Run | Parts) -> float:
    seconds = 0.0
    for part, counts in run.parts if isinstance(run, Parts) else ((run, True),):
        synchronize()
        dist.barrier()
        started = time.perf_counter()
        part()
        synchronize()
        seconds += (time.perf_counter() - started) * counts
    return seconds

