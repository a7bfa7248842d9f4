# SPDX-License-Identifier: Apache-2.0
"""Peak memory from encoder rows to the cut sequence and back, beyond what both bridges must have.

Both must have the cut sequence, its gradient and the gradient of the encoder's rows; these are not
counted. The bound is on the forward pass, which builds the fused sequence. On the CPU every
allocation of the tensor allocator is read from the profiler; a device's allocator keeps its peak.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.cases import EQUAL_2, FAN_IN_2_2, FAN_IN_4_4, FAN_OUT_2_2, Pair, TokenBatch
from benchmarks.paths import Bridges, GatherPath, RoutedPath, bridges, random_rows, rank_device

DEFAULT = (FAN_IN_4_4, FAN_IN_2_2, EQUAL_2, FAN_OUT_2_2)
_ROWS, _WIDTH, _TEXT = 6144, 256, 1
COLUMNS = {
    "layout": "layout (encoder/language)",
    "cp": "CP",
    "gather_MiB": "gather MiB, forward | backward",
    "routed_MiB": "routed MiB",
    "ratio": "ratio",
    "bound": "1/CP",
    "backward_ratio": "backward",
}


def measure(pairs: tuple[Pair, ...], quick: bool) -> Iterator[dict[str, Any]]:
    """A cell per pair; on all ranks."""
    for pair in pairs or (DEFAULT[:2] if quick else DEFAULT):
        with bridges(pair) as made:
            yield _cell(made)


def _cell(made: Bridges) -> dict[str, Any]:
    pair, batch = made.pair, TokenBatch.uniform(made.pair, _ROWS, _TEXT)
    held = random_rows(pair, batch, _WIDTH, torch.float32)
    vocabulary = torch.randn(16, _WIDTH, device=held.device, requires_grad=True)
    peaks = {}
    for name, path in (("gather", GatherPath(made, batch)), ("routed", RoutedPath(made, batch))):
        _once(path, held, vocabulary)  # what is allocated once
        peaks[name] = _once(path, held, vocabulary)
    forward, backward = (
        routed / gather for gather, routed in zip(*peaks.values(), strict=True)
    )
    cp = pair.language.cp
    return {
        "layout": str(pair),
        "cp": cp,
        "gather_MiB": [round(peak / 2**20, 2) for peak in peaks["gather"]],
        "routed_MiB": [round(peak / 2**20, 2) for peak in peaks["routed"]],
        "ratio": round(forward, 3),
        "bound": round(1 / cp, 3),
        "backward_ratio": round(backward, 3),
        "passed": forward <= 1 / cp,
    }


def _once(path: Any, held: torch.Tensor, vocabulary: torch.Tensor) -> tuple[int, int]:
    """Peak bytes of (forward, backward), the largest of all ranks."""
    made: list[torch.Tensor] = []

    def embed(places: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.embedding(places % len(vocabulary), vocabulary)

    def forward() -> None:
        made.append(path(held, embed))

    def backward() -> None:
        made.extend(torch.autograd.grad(made[0], (held, vocabulary), gradient))

    forward_peak = peak_bytes(forward)
    local = made[0]
    gradient = torch.ones_like(local)
    backward_peak = peak_bytes(backward)
    peaks = forward_peak - local.nbytes, backward_peak - held.nbytes
    return largest_of_ranks(peaks[0]), largest_of_ranks(peaks[1])


def peak_bytes(run: Callable[[], None]) -> int:
    """Most bytes that ``run`` has allocated at any moment and not freed yet."""
    if rank_device().type != torch.empty(0).device.type:
        module = torch.get_device_module(rank_device().type)
        before = module.memory_allocated()
        module.reset_peak_memory_stats()
        run()
        return module.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def largest_of_ranks(value: int) -> int:
    """A number's largest value on any rank."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return max(found)
