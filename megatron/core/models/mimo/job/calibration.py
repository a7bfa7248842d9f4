# SPDX-License-Identifier: Apache-2.0
"""What this machine's ranks reach in products, copies and collectives: a machine to plan with.

All ranks do the same at the same time, as in training, so ranks that share cores are measured as
they will be. A number is the slowest rank's.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron.core.models.mimo.plan.flops import (
    BACKWARD_ATTENTION,
    BACKWARD_MATMUL,
    attention_flops,
    seen_pairs,
)
from megatron.core.models.mimo.plan.machine import Machine
from megatron.core.models.mimo.plan.shapes import Stack
from megatron.core.models.mimo.transformer.layer_specs import use_transformer_engine

_MOST_REPEATS = 10_000


@dataclass(frozen=True)
class Probe:
    """What is measured.

    Attributes:
        device, dtype: of the tensors.
        tokens: of a rank.
        width, encoder_width: of the language model and of the encoder; their products are to MLPs
            of four times the width and back.
        heads: of the attention.
        seconds: for each measurement.
        ranks_of_node: ranks that share a node, neighbours.
        clock: seconds that go on.
    """

    device: torch.device
    dtype: torch.dtype
    tokens: int
    width: int
    encoder_width: int
    heads: int
    seconds: float
    ranks_of_node: int
    clock: Callable[[], float] = time.perf_counter


def calibrate(probe: Probe, name: str) -> Machine:
    """Measure and return this machine; every rank of the default group calls it.

    Args:
        probe: what is measured.
        name: of the machine.
    """
    world, node = dist.get_world_size(), min(probe.ranks_of_node, dist.get_world_size())
    neighbours, across = _groups(world, node)
    inside = _collective(probe, neighbours)
    between = _collective(probe, across) if world > node else inside
    for group in (neighbours, across):
        dist.destroy_process_group(group)
    copies = _copies(probe)
    return Machine(
        name=name,
        node=node,
        memory=_memory(probe.device, node),
        matmul=_products(probe, probe.width),
        attention=_attention(probe),
        encoder=_products(probe, probe.encoder_width),
        memory_rate=copies,
        inside=inside[0],
        between=between[0],
        inside_latency=inside[1],
        between_latency=between[1],
        host=copies if probe.device.type == "cpu" else _to_host(probe),
        communicator=_communicator(probe),
        fused=use_transformer_engine(),
    )


def ranks_of_node() -> int:
    """Return how many ranks share this node, as launchers tell; all of them if none does."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))


def _groups(world: int, node: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """This rank's groups: of its node, and one rank of each node."""
    rank, found = dist.get_rank(), []
    nodes = [list(range(first, first + node)) for first in range(0, world, node)]
    for members in (nodes, [list(range(place, world, node)) for place in range(node)]):
        made = [dist.new_group(each) for each in members]
        found.append(next(g for g, each in zip(made, members, strict=True) if rank in each))
    return found[0], found[1]


def _seconds(probe: Probe, call: Callable[[], object]) -> float:
    """Seconds of a call that all ranks make together."""
    call()
    once = _slowest(probe, _timed(probe, call, 1))
    repeats = max(1, min(_MOST_REPEATS, int(probe.seconds / max(once, 1e-9))))
    return _slowest(probe, _timed(probe, call, repeats)) / repeats


def _timed(probe: Probe, call: Callable[[], object], repeats: int) -> float:
    dist.barrier()
    _wait(probe.device)
    began = probe.clock()
    for _ in range(repeats):
        call()
    _wait(probe.device)
    return probe.clock() - began


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.cuda.synchronize(device)


def _slowest(probe: Probe, seconds: float) -> float:
    """The most of all ranks; they repeat equally often, so that collectives match."""
    told = torch.tensor([seconds], dtype=torch.float64, device=probe.device)
    dist.all_reduce(told, op=dist.ReduceOp.MAX)
    return max(float(told), 1e-9)


def _normal(probe: Probe, *shape: int) -> Tensor:
    made = torch.randn(*shape, device=probe.device, dtype=probe.dtype)
    return made.requires_grad_()


def _products(probe: Probe, width: int) -> float:
    """FLOPs a second of an MLP's products, forward and backward."""
    wide = 4 * width
    inputs, up, down = (_normal(probe, *s) for s in ((probe.tokens, width), (wide, width),
                                                     (width, wide)))  # fmt: skip

    def call() -> None:
        F.linear(F.linear(inputs, up), down).sum().backward()

    flops = 2 * 2 * probe.tokens * width * wide * (1 + BACKWARD_MATMUL)
    return flops / _seconds(probe, call)


def _attention(probe: Probe) -> float:
    """FLOPs a second of causal attention, as the planner counts them."""
    head = probe.width // probe.heads
    query, key, value = (_normal(probe, 1, probe.heads, probe.tokens, head) for _ in range(3))

    def call() -> None:
        F.scaled_dot_product_attention(query, key, value, is_causal=True).sum().backward()

    stack = Stack.of(1, probe.heads * head, 1, probe.heads)
    flops = attention_flops(stack, seen_pairs([probe.tokens], causal=True))
    return flops * (1 + BACKWARD_ATTENTION) / _seconds(probe, call)


def _copies(probe: Probe) -> float:
    """Bytes a second that are read and written."""
    source = _normal(probe, probe.tokens, 4 * probe.width).detach()
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(probe, lambda: target.copy_(source))


def _collective(probe: Probe, group: dist.ProcessGroup) -> tuple[float, float]:
    """Bytes a second that a rank gets in an all-gather, and seconds until the first one comes."""
    ranks = dist.get_world_size(group)
    if ranks == 1:
        return _copies(probe), 0.0
    mine = _normal(probe, probe.tokens // ranks + 1, probe.width).detach()
    whole = torch.empty(
        ranks * mine.shape[0], probe.width, device=probe.device, dtype=probe.dtype
    )
    one, small = mine[:1, :1].contiguous(), torch.empty(
        ranks, 1, device=probe.device, dtype=probe.dtype
    )
    latency = _seconds(probe, lambda: dist.all_gather_into_tensor(small, one, group=group))
    seconds = _seconds(probe, lambda: dist.all_gather_into_tensor(whole, mine, group=group))
    return (ranks - 1) * mine.nbytes / max(seconds - latency, 0.1 * seconds), latency


def _to_host(probe: Probe) -> float:
    """Bytes a second to page-locked memory."""
    source = _normal(probe, probe.tokens, probe.width).detach()
    target = torch.empty(source.shape, dtype=source.dtype, device="cpu", pin_memory=True)
    return source.nbytes / _seconds(probe, lambda: target.copy_(source, non_blocking=True))


def _memory(device: torch.device, ranks: int) -> float:
    """Bytes of an accelerator, or of the host that ranks share."""
    if device.type != "cpu":
        return float(torch.cuda.get_device_properties(device).total_memory)
    import psutil

    return psutil.virtual_memory().total / ranks


def _communicator(probe: Probe) -> float:
    """Bytes of the accelerator's memory that a new group takes; nothing on the CPU."""
    if probe.device.type == "cpu":
        return 0.0
    before = torch.cuda.mem_get_info(probe.device)[0]
    group: Any = dist.new_group(list(range(dist.get_world_size())))
    dist.all_reduce(torch.zeros(1, device=probe.device), group=group)
    _wait(probe.device)
    taken = before - torch.cuda.mem_get_info(probe.device)[0]
    dist.destroy_process_group(group)
    return float(max(0, taken))
