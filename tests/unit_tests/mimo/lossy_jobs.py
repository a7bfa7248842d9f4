# SPDX-License-Identifier: Apache-2.0
"""Megatron's layers on ranks that are threads of one process, for the tests of lossy links."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megatron.core.models.mimo.lossy.install import LossyLinks, lossy_links
from megatron.core.models.mimo.lossy.loss_models import GilbertElliott
from megatron.core.models.mimo.lossy.spec import LinkRule, LossySpec
from megatron.core.models.mimo.training.groups import ensure_global_memory_buffer
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from tests.unit_tests.mimo.in_process_ranks import InProcessWorld
from tests.unit_tests.mimo.model_stubs import language_config

ROOT = Path(__file__).resolve().parents[3]
WIDTH, INNER, LENGTH, BATCH, SEED = 8, 12, 4, 2, 5
# Small packets, so that a message has many: 3 elements of fp64, 13 of 16 bit.
PAYLOAD = 26
HALF = GilbertElliott(0.3, 0.3, 0.1, 0.9)
# fp64 sums of at most 8 terms of order 1, in another order.
EXACT = {"rtol": 1e-12, "atol": 1e-12}


class Block(nn.Module):
    """Column-parallel, a square, row-parallel with its bias; and a bias that all ranks hold."""

    def __init__(self, group: Any, sequence_parallel: bool, dtype: torch.dtype) -> None:
        super().__init__()
        size = group.size()
        config = language_config(
            hidden_size=WIDTH,
            num_attention_heads=4,
            tensor_model_parallel_size=size,
            sequence_parallel=sequence_parallel and size > 1,
            params_dtype=dtype,
            perform_initialization=False,
        )
        common = {"config": config, "init_method": None, "tp_group": group, "bias": True}
        self.up = ColumnParallelLinear(WIDTH, INNER, **common)
        self.down = RowParallelLinear(
            INNER, WIDTH, input_is_parallel=True, skip_bias_add=False, **common
        )
        for name, parameter in self.named_parameters():
            whole = weight(name).to(dtype)
            dim = {"up.weight": 0, "up.bias": 0, "down.weight": 1}.get(name)
            part = whole if dim is None else whole.chunk(size, dim)[group.rank()]
            parameter.data.copy_(part)
            parameter.tensor_model_parallel = dim is not None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x)[0].square())[0]


def weight(name: str) -> torch.Tensor:
    shape = {"up.weight": (INNER, WIDTH), "up.bias": (INNER,), "down.weight": (WIDTH, INNER)}
    generator = torch.Generator().manual_seed(len(name))
    return torch.randn(shape.get(name, (WIDTH,)), generator=generator, dtype=torch.float64)


def whole_input(step: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(LENGTH, BATCH, WIDTH, generator=generator, dtype=torch.float64)


def gradient(step: int = 0) -> torch.Tensor:
    return whole_input(1000 + step)


@dataclass
class Outcome:
    """What one rank has after some steps."""

    outputs: list[torch.Tensor]
    inputs: list[torch.Tensor]
    weights: dict[str, torch.Tensor]
    calls: dict[str, int]
    links: LossyLinks | None = None
    model: Any = None


@dataclass
class Job:
    """Steps of a block on some ranks."""

    spec: LossySpec | None = None
    tp: int = 2
    sequence_parallel: bool = False
    dtype: torch.dtype = torch.float64
    steps: int = 2
    around: Callable[[Any, LossyLinks | None], Any] = lambda model, links: None

    def run(self) -> list[Outcome]:
        ensure_global_memory_buffer()
        world = InProcessWorld(self.tp)
        outcomes = world.run(lambda rank: self._on_rank(world, rank))
        for rank, outcome in enumerate(outcomes):
            outcome.calls = {name: n for (name, _), n in world.counts(rank).items()}
        return outcomes

    def _on_rank(self, world: InProcessWorld, rank: int) -> Outcome:
        block = Block(world.everyone(), self.sequence_parallel, self.dtype)
        links = None if self.spec is None else lossy_links(block, self.spec)
        outcome = Outcome([], [], {}, {}, links, block)
        with links or contextlib.nullcontext():
            for step in range(self.steps):
                self._step(rank, step, outcome)
            self.around(block, links)
        outcome.weights = {name: p.grad for name, p in block.named_parameters()}
        return outcome

    def _step(self, rank: int, step: int, outcome: Outcome) -> None:
        x, dy = (
            self.own(whole.to(self.dtype), rank).clone()
            for whole in (whole_input(step), gradient(step))
        )
        kept, kept_dy = x.clone(), dy.clone()
        x.requires_grad_()
        y = outcome.model(x)
        y.backward(dy)
        assert torch.equal(x.detach(), kept)
        assert torch.equal(dy, kept_dy)
        assert (y.dtype, y.device) == (x.dtype, x.device)
        outcome.outputs.append(y.detach())
        outcome.inputs.append(x.grad)

    def own(self, x: torch.Tensor, rank: int) -> torch.Tensor:
        return x.chunk(self.tp)[rank] if self.sequence_parallel and self.tp > 1 else x


def spec(**changes: Any) -> LossySpec:
    rule = {"layers": "*", "loss": HALF, "payload": PAYLOAD, **changes}
    return LossySpec((LinkRule(**rule),), SEED)


def same(one: list[Outcome], other: list[Outcome]) -> bool:
    return all(
        torch.equal(a, b)
        for mine, theirs in zip(one, other, strict=True)
        for a, b in zip(
            [*mine.outputs, *mine.inputs, *mine.weights.values()],
            [*theirs.outputs, *theirs.inputs, *theirs.weights.values()],
            strict=True,
        )
    )


