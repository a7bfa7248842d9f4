# SPDX-License-Identifier: Apache-2.0
"""What overlap of gradient reductions and parameter gathers hides, in the digits job's step.

Both models have the same weights, batches and buckets; one reduces and gathers while it computes,
the other when it has computed. As in ``overlap.py`` a transport is modelled that needs no core:
each bucket's collective takes at least ``_WIRE`` seconds from its start, one after the other in a
module, as collectives of one group do. Without one (0 ms) gloo's threads share the cores that
compute, and nothing can be hidden.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch.distributed as dist

from benchmarks.cases import Pair
from benchmarks.wall_time import alternate
from examples.mimo.digits.data import DigitsBatches
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup
from mimo_colocated.launch.layouts import Layout
from tests.harness.garbage import end_threads_of_groups
from tests.models import model as digits_model
from tests.models.model import BuiltModel, ModelOptions, build_model
from tests.models.trainer import Trainer, TrainOptions

DEFAULT = (Pair(Layout(tp=1, dp=8), Layout(tp=2, cp=2, dp=2)),)
_BATCH, _SEED, _SECONDS, _BUCKET, _WIRE = 32, 1234, 20.0, 40_000, 0.02
# Overlapped over sequential step, at most, with the modelled transport.
BOUND = 0.9
COLUMNS = {
    "layout": "layout (encoder/language)",
    "buckets": "buckets, encoder + language model",
    "wire_ms": "modelled wire per bucket, ms",
    "sequential_ms": "step, after computing, ms",
    "overlapped_ms": "step, overlapped, ms",
    "ratio": "ratio",
}


def measure(pairs: tuple[Pair, ...], quick: bool) -> Iterator[dict[str, Any]]:
    """Two cells per pair; on all ranks."""
    for pair in pairs or DEFAULT:
        built = {name: _build(pair, name == "overlapped") for name in ("sequential", "overlapped")}
        runs = {name: _stepper(each) for name, each in built.items()}
        modules = list(built["overlapped"].model._active_ddp_modules())
        for wire in (0.0, _WIRE):
            with _slow(wire):
                taken = alternate(runs, _SECONDS / 4 if quick else _SECONDS)
            ms = {name: statistics.median(each) * 1e3 for name, each in taken.items()}
            ratio = ms["overlapped"] / ms["sequential"]
            yield {
                "layout": str(pair),
                "buckets": " + ".join(str(len(m.bucket_groups)) for m in reversed(modules)),
                "wire_ms": round(wire * 1e3),
                "sequential_ms": round(ms["sequential"], 1),
                "overlapped_ms": round(ms["overlapped"], 1),
                "ratio": round(ratio, 3),
                "passed": ratio <= BOUND if wire else None,
            }
        dist.barrier()
        for each in built.values():
            each.destroy()
        del built, runs, modules
        end_threads_of_groups()


def _build(pair: Pair, overlap: bool) -> BuiltModel:
    # Stock makes one bucket of all without overlap; both shall have as many collectives.
    options = ModelOptions(seed=_SEED, overlap_grad_reduce=True, overlap_param_gather=overlap)
    small = functools.partial(DistributedDataParallelConfig, bucket_size=_BUCKET)
    with mock.patch.object(digits_model, "DistributedDataParallelConfig", small):
        built = build_model(pair.vision, pair.language, options)
    for module in built.model._active_ddp_modules():
        module.ddp_config.overlap_grad_reduce = overlap
    return built


def _stepper(built: BuiltModel) -> Callable[[], None]:
    trainer = Trainer(built, TrainOptions(steps=1000, global_batch_size=_BATCH), True)
    batches, done = DigitsBatches(_SEED, "train", _BATCH), iter(range(1000))
    return lambda: trainer.step(batches, next(done)) and None


class _Wired:
    """A collective under way that ends at a given time, or later."""

    def __init__(self, handle: Any, end: float) -> None:
        self._handle, self._end = handle, end

    def wait(self) -> None:
        """For both."""
        self._handle.wait()
        time.sleep(max(0.0, self._end - time.perf_counter()))


@contextlib.contextmanager
def _slow(wire: float) -> Iterator[None]:
    """Every bucket's collective takes ``wire`` seconds, after those before it in its group."""
    ends: dict[Any, float] = {}

    def slowed(start: Callable[..., None], attribute: str) -> Callable[..., None]:
        def begin(group: Any, *args: Any, **kwargs: Any) -> None:
            start(group, *args, **kwargs)
            process_group = group.intra_distributed_optimizer_instance_group
            ends[process_group] = wire + max(ends.get(process_group, 0.0), time.perf_counter())
            handle = getattr(group, attribute)
            if handle is None:  # it has been waited for
                time.sleep(max(0.0, ends[process_group] - time.perf_counter()))
            else:
                setattr(group, attribute, _Wired(handle, ends[process_group]))

        return begin

    slow = {
        name: slowed(getattr(_ParamAndGradBucketGroup, name), attribute)
        for name, attribute in (
            ("start_param_sync", "param_gather_handle"),
            ("start_grad_sync", "grad_reduce_handle"),
        )
    }
    with mock.patch.multiple(_ParamAndGradBucketGroup, **slow):
        yield
