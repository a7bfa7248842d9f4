# SPDX-License-Identifier: Apache-2.0
"""What this machine's ranks reach in layers, copies and collectives: a machine to plan with.

All ranks do the same at the same time, as in training, so ranks that share cores are measured as
they will be. A number is the slowest rank's. A layer is timed with many tokens and with few: what
does not shrink with them is what its operations take to start.
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

from megatron.core.models.mimo.job.probed_layers import (
    Run,
    encoder_layer,
    encoder_stack,
    language_layer,
    language_stack,
)
from megatron.core.models.mimo.plan.flops import (
    BACKWARD_ATTENTION,
    BACKWARD_MATMUL,
    attention_flops,
    layer_flops,
    seen_pairs,
)
from megatron.core.models.mimo.plan.machine import Machine
from megatron.core.models.mimo.training.groups import create_process_groups, make_grid
from megatron.core.models.mimo.transformer.layer_specs import use_transformer_engine

_MOST_REPEATS = 10_000
# Tokens of the layer that is timed with few of them, as a part of all.
_FEW = 8
# A pass back starts twice as many operations as a pass forward.
_PASSES = 1 + BACKWARD_MATMUL
# torch 2.13 renames both and warns about the old names.
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Probe:
    """What is measured.

    Attributes:
        device, dtype: of the tensors.
        tokens: of a rank.
        width, encoder_width: of the language model and of the encoder.
        heads: of the attention of either.
        item_tokens: of what the encoder encodes, an image, say.
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
    item_tokens: int
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
    neighbours, across, two = _groups(world, node)
    inside, pair = _collective(probe, neighbours), _collective(probe, two)
    between = _collective(probe, across) if world > node else inside
    members = dist.get_world_size(neighbours)
    hop = max(0.0, inside[1] - pair[1]) / (members - 2) if members > 2 else 0.0
    across_hops = hop * max(0, dist.get_world_size(across) - 2)
    hidden = _hidden(probe, neighbours)
    for group in (neighbours, across, two):
        dist.destroy_process_group(group)
    copies = _copies(probe)
    attention = _attention(probe)
    language, encoder = _layers(probe, attention)
    return Machine(
        name=name,
        node=node,
        memory=_memory(probe.device, node),
        matmul=language[0],
        attention=attention,
        encoder=encoder[0],
        memory_rate=copies,
        inside=inside[0],
        between=between[0],
        inside_latency=pair[1],
        between_latency=max(0.0, between[1] - across_hops) if world > node else pair[1],
        hop_latency=hop,
        layer_start=language[1],
        hidden=hidden,
        host=copies if probe.device.type == "cpu" else _to_host(probe),
        communicator=_communicator(probe),
        fused=use_transformer_engine(),
    )


def ranks_of_node() -> int:
    """Return how many ranks share this node, as launchers tell; all of them if none does."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))


def _groups(
    world: int, node: int
) -> tuple[dist.ProcessGroup, dist.ProcessGroup, dist.ProcessGroup]:
    """This rank's groups: of its node, one rank of each node, and two neighbours."""
    rank, found = dist.get_rank(), []
    nodes = [list(range(first, first + node)) for first in range(0, world, node)]
    across = [list(range(place, world, node)) for place in range(node)]
    pairs = [list(range(first, min(first + 2, world))) for first in range(0, world, 2)]
    for members in (nodes, across, pairs):
        made = [dist.new_group(each) for each in members]
        found.append(next(g for g, each in zip(made, members, strict=True) if rank in each))
    return found[0], found[1], found[2]


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


def _layers(probe: Probe, attention: float) -> tuple[tuple[float, float], tuple[float, float]]:
    """FLOPs a second, and seconds that a forward pass starts, of both kinds of layers.

    What a language model's attention takes is known by its own rate; an encoder's is in its rate.
    """
    grid = make_grid(dp=dist.get_world_size())
    groups = create_process_groups(grid)
    causal = language_stack(probe.width, probe.heads)
    whole = encoder_stack(probe.encoder_width, probe.heads)
    like = probe.device, probe.dtype
    layers = language_layer(causal, groups, *like)
    encoders = encoder_layer(whole, probe.item_tokens, groups, *like)

    def products(tokens: int) -> tuple[float, float]:
        scores = attention_flops(causal, seen_pairs([tokens], causal=True))
        scores *= (1 + BACKWARD_ATTENTION) / attention
        return _PASSES * layer_flops(causal, tokens), scores

    def items(tokens: int) -> tuple[float, float]:
        count = max(1, tokens // probe.item_tokens)
        scores = attention_flops(whole, count * seen_pairs([probe.item_tokens], causal=False))
        linear = layer_flops(whole, count * probe.item_tokens)
        return _PASSES * linear + (1 + BACKWARD_ATTENTION) * scores, 0.0

    found = _line(probe, layers, products), _line(probe, encoders, items)
    grid.destroy()
    return found


def _line(
    probe: Probe, layer: Run, work: Callable[[int], tuple[float, float]]
) -> tuple[float, float]:
    """FLOPs a second of a layer, and seconds that the operations of a forward pass start.

    Args:
        probe: what is measured.
        layer: its passes over so many tokens.
        work: FLOPs of so many tokens, and seconds that are known.
    """
    points = []
    for tokens in (probe.tokens, max(1, probe.tokens // _FEW)):
        flops, known = work(tokens)
        taken = _seconds(probe, layer(tokens))
        # What is known was measured apart and may be more than it is among other work.
        points.append((flops, max(taken - known, taken / 2)))
    (many, long), (few, short) = points
    # Were it more than half, the sizes would be too small to tell a rate.
    rate = (many - few) / max(long - short, long / 2)
    return rate, max(0.0, short - few / rate) / _PASSES


def _attention(probe: Probe) -> float:
    """FLOPs a second of causal attention, as the planner counts them."""
    head = probe.width // probe.heads
    query, key, value = (_normal(probe, 1, probe.heads, probe.tokens, head) for _ in range(3))

    def call() -> None:
        F.scaled_dot_product_attention(query, key, value, is_causal=True).sum().backward()

    stack = language_stack(probe.heads * head, probe.heads)
    flops = attention_flops(stack, seen_pairs([probe.tokens], causal=True))
    return flops * (1 + BACKWARD_ATTENTION) / _seconds(probe, call)


def _copies(probe: Probe) -> float:
    """Bytes a second that are read and written."""
    source = _normal(probe, probe.tokens, 4 * probe.width).detach()
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(probe, lambda: target.copy_(source))


def _collective(probe: Probe, group: dist.ProcessGroup) -> tuple[float, float]:
    """Bytes a second that a rank gets, and seconds until the first one comes.

    Of gathering and of scattering sums, in turn: layouts do both equally often.
    """
    ranks = dist.get_world_size(group)
    if ranks == 1:
        return _copies(probe), 0.0
    rows = probe.tokens // ranks + 1
    begin = _there_and_back(probe, _parts(probe, ranks, 1, 1), group)
    seconds = _there_and_back(probe, _parts(probe, ranks, rows, probe.width), group)
    moved = (ranks - 1) * rows * probe.width * probe.dtype.itemsize
    return moved / max(seconds - begin, 0.1 * seconds), begin


def _parts(probe: Probe, ranks: int, rows: int, width: int) -> tuple[Tensor, Tensor]:
    """A rank's part of a tensor, and the whole one."""
    return _normal(probe, rows, width).detach(), _normal(probe, ranks * rows, width).detach()


def _there_and_back(
    probe: Probe, parts: tuple[Tensor, Tensor], group: dist.ProcessGroup
) -> float:
    """Seconds of a collective: the mean of gathering and scattering."""
    mine, whole = parts

    def both() -> None:
        _gather(whole, mine, group=group)
        _scatter(mine, whole, group=group)

    return _seconds(probe, both) / 2


def _hidden(probe: Probe, group: dist.ProcessGroup) -> float:
    """The part of a collective that products beside it hide."""
    ranks = dist.get_world_size(group)
    if ranks == 1:
        return 0.0
    mine, whole = _parts(probe, ranks, probe.tokens, probe.width)
    one = _normal(probe, probe.tokens, probe.width).detach()
    other = _normal(probe, probe.width, 4 * probe.width).detach()

    def gather() -> Any:
        return _gather(whole, mine, group=group, async_op=True)

    def both(repeats: int) -> None:
        sent = gather()
        for _ in range(repeats):
            torch.mm(one, other)
        sent.wait()

    alone = _seconds(probe, lambda: gather().wait())
    product = _seconds(probe, lambda: torch.mm(one, other))
    # About as many products as the collective takes.
    repeats = max(1, min(_MOST_REPEATS, round(alone / product)))
    together = _seconds(probe, lambda: both(repeats))
    spared = alone + repeats * product - together
    return min(1.0, max(0.0, spared / min(alone, repeats * product)))


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
