# SPDX-License-Identifier: Apache-2.0
"""What encoding ahead hides: exchanges of other microbatches beside the language model's work.

One model, the same batches: microbatch after microbatch, and with ``encode_ahead``; forward,
backward and finalised gradients. As in ``overlap.py`` a transport is modelled that needs no core.
Here it moves one exchange of a rank after the other, and takes as long for each as makes exchanges
a third of the step that does not encode ahead. Gradients are compared: they are the same.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from benchmarks.cases import FAN_IN_2_2, FAN_IN_4_4, Pair
from benchmarks.paths import rank_device
from benchmarks.wall_time import alternate
from examples.mimo.digits.data import DigitsBatches
from megatron.core.models.mimo.comm.exchange import Flight
from tests.harness.garbage import end_threads_of_groups
from tests.models.model import ModelOptions, build_model
from tests.models.trainer import Trainer, TrainOptions
from tests.parity.tensors import local_gradients

_MICROBATCHES, _SAMPLES, _SEED, _SECONDS = 8, 8, 1234, 30.0
_SHARE = 1 / 3
# Of the step, ahead over one by one, at most; where exchanges are this much of it, at least.
BOUND, LEAST_SHARE = 0.8, 0.2
COLUMNS = {
    "layout": "layout (encoder/language)",
    "wire_ms": "modelled wire, ms",
    "share": "waiting for exchanges, of the step",
    "plain_ms": "one by one, ms",
    "ahead_ms": "encode_ahead=1, ms",
    "ratio": "ratio",
    "left": "waiting that is left",
}


def measure(pairs: tuple[Pair, ...], quick: bool) -> Iterator[dict[str, Any]]:
    """Two cells per pair, without the wire and with it; on all ranks."""
    for pair in pairs or ((FAN_IN_4_4,) if quick else (FAN_IN_4_4, FAN_IN_2_2)):
        built = build_model(pair.vision, pair.language, ModelOptions(seed=_SEED))
        count = _MICROBATCHES * _SAMPLES
        trainer = Trainer(built, TrainOptions(10, count, _MICROBATCHES), True)
        runs = {"plain": _once(trainer, None), "ahead": _once(trainer, 1)}
        _check_gradients(trainer, runs)
        try:
            seconds = _SECONDS / 4 if quick else _SECONDS
            yield (free := _cell(pair, runs, 0.0, seconds))
            exchanges = free["plain_ms"] / 1e3 * _SHARE / (1 - _SHARE)
            yield _cell(pair, runs, exchanges / (2 * _MICROBATCHES), seconds)
        finally:
            dist.barrier()
            built.destroy()
            end_threads_of_groups()


def _cell(
    pair: Pair, runs: dict[str, Callable[[], None]], wire: float, seconds: float
) -> dict[str, Any]:
    waits: dict[str, list[float]] = {name: [] for name in runs}
    with _wired(wire) as waited:

        def noted(name: str) -> Callable[[], None]:
            def run() -> None:
                waited.clear()
                runs[name]()
                waits[name].append(sum(waited))

            return run

        taken = alternate({name: noted(name) for name in runs}, seconds, (3, 100))
    total = {name: statistics.median(each) for name, each in taken.items()}
    waiting = {name: _mean(statistics.median(each)) for name, each in waits.items()}
    ratio, share = total["ahead"] / total["plain"], waiting["plain"] / total["plain"]
    return {
        "layout": str(pair),
        "wire_ms": round(wire * 1e3, 1),
        "share": round(share, 3),
        "plain_ms": round(total["plain"] * 1e3, 1),
        "ahead_ms": round(total["ahead"] * 1e3, 1),
        "ratio": round(ratio, 3),
        "left": round(waiting["ahead"] / max(waiting["plain"], 1e-9), 3),
        "passed": ratio <= BOUND and share >= LEAST_SHARE if wire else None,
    }


def _once(trainer: Trainer, ahead: int | None) -> Callable[[], None]:
    batches = DigitsBatches(_SEED, "train", _MICROBATCHES * _SAMPLES)

    def run() -> None:
        trainer.options = replace(trainer.options, encode_ahead=ahead)
        trainer.gradients(batches, 0)

    return run


def _check_gradients(trainer: Trainer, runs: dict[str, Callable[[], None]]) -> None:
    """Raise ``AssertionError`` if the two ways differ in any gradient."""
    found = []
    for run in runs.values():
        run()
        found.append({n: g.clone() for n, g in local_gradients(trainer.built.model).items()})
    assert all(torch.equal(found[0][name], gradient) for name, gradient in found[1].items())


@contextlib.contextmanager
def _wired(wire: float) -> Iterator[list[float]]:
    """Seconds of every wait for an exchange, as a growing list.

    An exchange ends ``wire`` seconds after its start and after those of this rank before it, or
    later.
    """
    waited: list[float] = []
    ends: dict[Flight, float] = {}
    free = [0.0]
    start_it, wait_for_it = Flight.start, Flight.wait

    def start(flight: Flight, *arguments: Any) -> None:
        start_it(flight, *arguments)
        ends[flight] = free[0] = wire + max(free[0], time.perf_counter())

    def wait(flight: Flight) -> None:
        started = time.perf_counter()
        wait_for_it(flight)
        time.sleep(max(0.0, ends.pop(flight, started) - time.perf_counter()))
        waited.append(time.perf_counter() - started)

    with mock.patch.multiple(Flight, start=start, wait=wait):
        yield waited


def _mean(value: float) -> float:
    mine = torch.tensor(value, dtype=torch.float64, device=rank_device())
    dist.all_reduce(mine)
    return float(mine) / dist.get_world_size()
