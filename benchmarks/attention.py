# SPDX-License-Identifier: Apache-2.0
"""Context-parallel attention that keeps its own keys and values, beside one that keeps all.

Both are the project's, over gloo, taking turns. The second saves what PyTorch's attention saves,
and leaves grouped queries to PyTorch. Kept: bytes that live between the two passes, but for the
inputs, on the rank that keeps most.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from benchmarks.cases import Pair
from benchmarks.wall_time import alternate
from megatron.core.models.mimo.training.groups import make_grid
from megatron.core.models.mimo.transformer import context_parallel_attention as cpa
from megatron.core.models.mimo.transformer.gathered_keys import GatheredKeys
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from tests.harness.backend import own_device
from tests.unit_tests.mimo.attention_oracle import Storages, tiny_config

_SEQUENCE, _HEADS, _GROUPS, _WIDTH, _SECONDS = 2048, 8, 2, 64, 20.0
# Kept, over what one that keeps all keeps, at most.
BOUND = 1.0
COLUMNS = {
    "cp": "CP",
    "causal": "causal",
    "own_kib": "kept, own keys and values, KiB",
    "whole_kib": "kept, all, KiB",
    "kept_ratio": "ratio",
    "own_ms": "forward + backward, own, ms",
    "whole_ms": "all, ms",
    "ratio": "ratio of times",
}


def measure(pairs: tuple[Pair, ...], quick: bool) -> Iterator[dict[str, Any]]:
    """Two cells per CP size, those of the pairs' language models; on all ranks."""
    size = dist.get_world_size()
    for cp in sorted({pair.language.cp for pair in pairs} - {1}) or (2, 4, 8):
        grid = make_grid(cp=cp, dp=size // cp)
        groups = ProcessGroupCollection(cp=grid.get_or_create_pg("cp"))
        for causal in (False, True):
            yield _cell(groups, causal, _SECONDS / 4 if quick else _SECONDS)
        dist.barrier()
        grid.destroy()


def _cell(groups: ProcessGroupCollection, causal: bool, seconds: float) -> dict[str, Any]:
    cp = groups.cp.size()
    mask = AttnMaskType.causal if causal else AttnMaskType.no_mask
    config = tiny_config(context_parallel_size=cp)
    attention = cpa.ContextParallelAttention(config, 1, mask, "self", pg_collection=groups)
    inputs = [
        torch.randn(_SEQUENCE // cp, 1, heads, _WIDTH, device=own_device(), requires_grad=True)
        for heads in (_HEADS, _GROUPS, _GROUPS)
    ]
    kept: dict[str, int] = {}

    def run(name: str) -> None:
        with _WAYS[name](), Storages() if name not in kept else contextlib.nullcontext() as seen:
            out = attention(*inputs, None)
        if seen is not None:
            kept[name] = seen.alive()
        out.sum().backward()

    runs = {name: lambda name=name: run(name) for name in _WAYS}
    ms = {name: statistics.median(each) * 1e3 for name, each in alternate(runs, seconds).items()}
    most = torch.tensor([kept[name] / 1024 for name in _WAYS], device=own_device())
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    own, whole = most.tolist()
    return {
        "cp": cp,
        "causal": causal,
        "own_kib": round(own),
        "whole_kib": round(whole),
        "kept_ratio": round(own / whole, 3),
        "own_ms": round(ms["own"], 1),
        "whole_ms": round(ms["whole"], 1),
        "ratio": round(ms["own"] / ms["whole"], 3),
        "passed": own / whole <= BOUND,
    }


@contextlib.contextmanager
def _keeping_all() -> Iterator[None]:
    """Save whatever PyTorch's attention saves, of grouped queries as it takes them."""
    with (
        mock.patch.object(GatheredKeys, "leaving_out", return_value=contextlib.nullcontext()),
        mock.patch.object(GatheredKeys, "before_backward", lambda self, out: out),
        mock.patch.object(cpa, "_by_groups", lambda *tensors: tensors),
    ):
        yield


_WAYS: dict[str, Callable[[], Any]] = {"own": contextlib.nullcontext, "whole": _keeping_all}
