# SPDX-License-Identifier: Apache-2.0
"""What it takes a rank to plan a global batch when there are many replicas.

Each cell is one number of language replicas, of eight samples each, one to three images in each.
A rank's batch is made as in a run, its images left out: positions, lengths, packing, the images of
its exchange group shared out, tokens put together, routes. Encoder replicas are twice as many.

* ``even_ms``: samples shared out evenly by length.
* ``filled_ms``: sequences filled, first fit, to as many samples.
* ``all_ms``: the first, for the exchange groups of all ranks: what no rank has to do.

Bound: 50 ms for either. CPU time, the best of five: nothing else that a machine does counts.
``growth`` is ``even_ms`` over that of a quarter of the replicas; 4 is linear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np

from benchmarks.scale import Watch, apart
from megatron.core.hyper_comm_grid import GridShape
from megatron.core.models.mimo.comm.plan.balance import TokenCost
from megatron.core.models.mimo.comm.plan.routed_layout import RouteLayout
from megatron.core.models.mimo.data.arrays import count_up
from megatron.core.models.mimo.data.batches import Cut, ItemRows, plan_batch
from megatron.core.models.mimo.data.loader import EncoderSide, RankBatches, Side
from megatron.core.models.mimo.data.order import Order
from megatron.core.models.mimo.data.stream import BatchSize, SampleStream

SIZES, QUICK = (256, 1024), (16, 64)
MILLISECONDS = 50.0
_SAMPLES, _EPOCH, _TP, _CP, _MULTIPLE, _IMAGE, _ROWS = 8, 200_000, 2, 2, 8, 3, 16
COLUMNS = {
    "replicas": "language replicas",
    "samples": "samples of a step",
    "even_ms": "a rank, shared out evenly, ms",
    "filled_ms": "a rank, sequences filled, ms",
    "all_ms": "all groups ms",
    "growth": "growth",
    "passed": "",
}


class Drawn:
    """Samples of drawn lengths and images; what a run maps, in memory."""

    def __init__(self, count: int) -> None:
        draw = np.random.default_rng(3)
        self.numbers = np.arange(count)
        self._images = draw.integers(1, 4, size=count)
        self._lengths = self._images * _ROWS + draw.integers(20, 400, size=count)

    def __len__(self) -> int:
        """Samples."""
        return len(self.numbers)

    def lengths(self, samples: np.ndarray) -> np.ndarray:
        """Tokens of samples."""
        return self._lengths[samples]

    def items(self, samples: np.ndarray) -> ItemRows:
        """Rows of their images."""
        counts = self._images[samples]
        return ItemRows(np.full(int(counts.sum()), _ROWS), counts)

    def grids(self, sample: int) -> np.ndarray:
        """None has rows and columns."""
        return np.zeros((self._images[sample], 3), dtype=np.int32)

    def tokens(self, sample: int) -> tuple[np.ndarray, np.ndarray]:
        """Images first, then text that is learned."""
        ids = np.ones(self._lengths[sample], dtype=np.int32)
        ids[: self._images[sample] * _ROWS] = _IMAGE
        return ids, ids != _IMAGE


class _Nothing:
    """Reads no image, and has none to read."""

    def __getitem__(self, _number: int) -> _Nothing:
        return self

    def items(self) -> list[Any]:
        return [None] * 3

    def read(self, items: list[Any]) -> dict[str, np.ndarray]:
        return {"pixel_values": np.empty(len(items))}


def run(quick: bool = False) -> Iterator[dict[str, Any]]:
    """A cell per number of replicas, ascending."""
    before: dict[str, Any] | None = None
    for replicas in QUICK if quick else SIZES:
        cell = {"replicas": replicas, "samples": _SAMPLES * replicas, **apart(_measure, replicas)}
        cell["growth"] = before and round(cell["even_ms"] / before["even_ms"], 2)
        cell["passed"] = max(cell["even_ms"], cell["filled_ms"]) < MILLISECONDS
        before = cell
        yield cell


def _measure(replicas: int) -> dict[str, float]:
    language = GridShape((_TP, _CP, replicas), ("tp", "cp", "dp"))
    images = GridShape((_TP, _CP * replicas), ("tp", "dp"))
    bridge = RouteLayout.from_grids(images, language)
    data = Drawn(_EPOCH)
    capacity = int(_SAMPLES * data.lengths(data.numbers).mean()) // _MULTIPLE * _MULTIPLE
    found = {}
    for name, sequences in (("even_ms", 0), ("filled_ms", replicas)):
        cut = Cut(1, replicas, True, _MULTIPLE, sequences, capacity)
        counted = 0 if sequences else _SAMPLES * replicas
        size = BatchSize(counted, sequences, capacity, _MULTIPLE)
        stream = SampleStream(Order((_EPOCH,), (1.0,), 1), [data], size)
        found[name] = _best(_of_a_rank(stream, images, language, cut).at)
        if not sequences:
            found["all_ms"] = _best(_of_all_groups(stream, bridge, cut))
    return found


def _of_a_rank(
    stream: SampleStream, images: GridShape, language: GridShape, cut: Cut
) -> RankBatches:
    rank, nothing = language.size // 2 + 1, cast(Any, _Nothing())
    bridge = RouteLayout.from_grids(images, language)
    side = EncoderSide(bridge, _IMAGE, images.coords(rank)["dp"], nothing, TokenCost())
    own = Side(rank, language.coords(rank)["dp"], cut, 0, count_up, {"images": side})
    return RankBatches(stream, [nothing], own)


def _of_all_groups(stream: SampleStream, bridge: RouteLayout, cut: Cut) -> Callable[[int], Any]:
    groups = [(each.src_dps.tolist(), each.dest_dps.tolist()) for each in bridge.groups()]

    def plan(at: int) -> Any:
        batch = stream.batch(at)
        items = {"images": stream.items(batch)}
        return plan_batch(batch.lengths, items, cut, {"images": groups}, TokenCost())

    return plan


def _best(make: Callable[[int], Any]) -> float:
    make(0)  # the first batch of an epoch draws its order
    watch = Watch()
    return round(1000 * min(_lap(make, at, watch) for at in range(5)), 2)


def _lap(make: Callable[[int], Any], at: int, watch: Watch) -> float:
    watch.lap()
    make(at * 8)
    return watch.lap()
