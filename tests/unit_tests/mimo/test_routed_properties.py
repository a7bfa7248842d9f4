# SPDX-License-Identifier: Apache-2.0
"""What holds for every routed bridge: random layouts of up to 64 ranks, all in this process.

Any DP ratio, any number of tokens per sample (none, some, all), rows spread over the encoder
replicas in any way. Numbers are whole, so all comparisons are exact.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron.core.models.mimo.comm.plan.routes import plan_routes
from megatron.core.models.mimo.comm.plan.token_runs import TokenRuns
from megatron.core.models.mimo.comm.routed_bridge import RoutedBridge
from tests.unit_tests.mimo.bridge_cases import Dims, coordinates, factorised, grid
from tests.unit_tests.mimo.in_process_ranks import InProcessWorld
from tests.unit_tests.mimo.test_partition_properties import CutCase

pytestmark = pytest.mark.once

HIDDEN = 2


@dataclass(frozen=True)
class RoutedCase:
    """One routed bridge and one microbatch.

    Attributes:
        src, dest: (name, size) of each dim, fastest first.
        batch, pieces: samples of a language replica; parts of a sequence in its smallest unit.
        density: share of positions that are tokens of the modality.
        planned_ahead: from integers; else by the bridge, whose ranks tell one another.
        seed: of values, masks, cuts and of the order in which ranks take turns.
    """

    src: Dims
    dest: Dims
    sequence_parallel: bool
    batch: int
    pieces: int
    density: float
    planned_ahead: bool
    offset: int
    seed: int

    @property
    def ranks(self) -> range:
        return range(self.offset, self.offset + math.prod(size for _, size in self.src))

    @property
    def cut(self) -> CutCase:
        sizes = dict(self.dest)
        unit = (2 * sizes["cp"] if sizes["cp"] > 1 else 1) * sizes["tp"]
        return CutCase(self.dest, (unit * self.pieces,), False, self.sequence_parallel, self.batch)

    def picture(self) -> tuple[torch.Tensor, np.ndarray, torch.Tensor]:
        """Per language replica: values, mask and gradients ``(dp, B, S[, H])``."""
        generator = np.random.default_rng(self.seed)
        shape = (dict(self.dest)["dp"], self.batch, sum(self.cut.lengths))
        mask = generator.random(shape) < self.density
        values, gradient = generator.integers(-9, 10, (2, *shape, HIDDEN)).astype(float)
        return torch.from_numpy(values), mask, torch.from_numpy(gradient)

    def exchange(self, replica: int) -> tuple[list[int], list[int]]:
        """Source and destination replicas that a destination replica is linked with.

        Where both sides' cuts of the batch meet it falls into blocks. A rank links the block of
        its source replica with that of its destination replica: one block, if replicas nest.
        """
        sizes = dict(self.src)["dp"], dict(self.dest)["dp"]
        each = [size // math.gcd(*sizes) for size in sizes]
        linked = {replica // each[1]}
        while True:
            pairs = [
                {
                    coordinates(dims, rank)["dp"] // n
                    for dims, n in zip((self.src, self.dest), each, strict=True)
                }
                for rank in range(len(self.ranks))
            ]
            more = linked.union(*(pair for pair in pairs if pair & linked))
            if more == linked:
                blocks = [[b * n + i for b in sorted(linked) for i in range(n)] for n in each]
                return blocks[0], blocks[1]
            linked = more

    def bounds(self, sources: list[int], rows: int) -> list[int]:
        """Where the rows of an exchange group are cut for its encoder replicas."""
        generator = np.random.default_rng(self.seed + 1000 * (1 + sources[0]))
        cuts = sorted(generator.integers(0, rows + 1, len(sources) - 1).tolist())
        return [0, *cuts, rows]


@dataclass(frozen=True)
class Moved:
    """One rank: coordinates, held rows, fused part of the sequence, and their gradients."""

    src: dict[str, int]
    dest: dict[str, int]
    x: torch.Tensor
    y: torch.Tensor
    y_grad: torch.Tensor
    x_grad: torch.Tensor
    expected: torch.Tensor
    expected_grad: torch.Tensor
    calls: dict[tuple[str, tuple[int, ...]], int]


def move_on_rank(case: RoutedCase, rank: int, world: InProcessWorld) -> Moved | None:
    bridge = RoutedBridge(
        grid(case.src, case.offset),
        grid(case.dest, case.offset),
        sequence_parallel=case.sequence_parallel,
        guard="off",
    )
    if rank not in case.ranks:
        return None
    values, mask, gradient = case.picture()
    place = rank - case.offset
    src, dest = coordinates(case.src, place), coordinates(case.dest, place)
    sources, replicas = case.exchange(dest["dp"])
    chosen = torch.from_numpy(mask[replicas])
    rows, row_grads = values[replicas][chosen], gradient[replicas][chosen]
    bounds = case.bounds(sources, len(rows))
    mine = slice(*bounds[sources.index(src["dp"]) :][:2])
    x = rows[mine].clone().requires_grad_()
    tokens = [TokenRuns.from_mask(mask[replica]) for replica in replicas]
    if case.planned_ahead:
        plan = plan_routes(bridge.layout, rank, tokens, np.diff(bounds).tolist())
    else:
        plan = bridge.plan(tokens[replicas.index(dest["dp"])], x)
    before = world.counts(rank)
    own = bridge.move(x, plan)
    kept = case.cut.scattered(dest)
    masked = torch.from_numpy(mask[dest["dp"]])[..., None]
    expected = (values[dest["dp"]] * masked)[:, kept].transpose(0, 1)
    fused = x.new_zeros(expected.shape).flatten(0, 1)
    y = fused.index_copy(0, bridge.tensors(plan, x.device).place, own).view(expected.shape)
    y_grad = gradient[dest["dp"]][:, kept].transpose(0, 1)
    y.backward(y_grad)
    calls = {c: n - before.get(c, 0) for c, n in world.counts(rank).items() if n != before.get(c)}
    return Moved(
        src, dest, x.detach(), y.detach(), y_grad, x.grad, expected, row_grads[mine], calls
    )


def move_everywhere(case: RoutedCase) -> list[Moved]:
    world = InProcessWorld(case.ranks.stop, case.seed)
    results = world.run(lambda rank: move_on_rank(case, rank, world))
    return [results[rank] for rank in case.ranks]


def check_values_and_gradients(case: RoutedCase) -> None:
    """Rows are at their places, zeros elsewhere; each holder has its rows' whole gradient."""
    for moved in move_everywhere(case):
        assert torch.equal(moved.y, moved.expected), moved.dest
        assert torch.equal(moved.x_grad, moved.expected_grad), moved.src


def check_adjoint(case: RoutedCase) -> None:
    """``<A x, g> == <x, A^T g>`` over unique copies.

    On the source side one TP rank of a replica counts. On the destination side every owner of
    positions counts once: all CP ranks, and with sequence parallelism all TP ranks.
    """
    moved = move_everywhere(case)
    there = [(m.y * m.y_grad).sum() for m in moved if case.sequence_parallel or m.dest["tp"] == 0]
    back = [(m.x * m.x_grad).sum() for m in moved if m.src["tp"] == 0]
    assert sum(there) == sum(back)


def check_one_exchange_each_way(case: RoutedCase) -> None:
    """At most one all-to-all in forward and one in backward, the same number on all its ranks."""
    for moved in move_everywhere(case):
        assert {name for name, _ in moved.calls} <= {"all_to_all"}
        assert sum(moved.calls.values()) <= 2


@st.composite
def routed_cases(draw: Callable[..., Any]) -> RoutedCase:
    ranks = draw(st.sampled_from([4, 6, 8, 12, 16, 24, 36, 48, 60, 64]) | st.integers(1, 64))
    src = draw(st.permutations(draw(st.sampled_from(factorised(ranks, ("tp", "dp"))))))
    dims = draw(st.sampled_from(factorised(ranks, ("tp", "cp", "dp"))))
    orders = [o for o in itertools.permutations(dims) if o.index(dims[1]) < o.index(dims[2])]
    return RoutedCase(
        src=tuple(src),
        dest=draw(st.sampled_from(orders)),
        sequence_parallel=dict(dims)["tp"] > 1 and draw(st.booleans()),
        batch=draw(st.integers(1, 3)),
        pieces=draw(st.integers(1, 2)),
        density=draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])),
        planned_ahead=draw(st.booleans()),
        offset=draw(st.integers(0, 2)),
        seed=draw(st.integers(0, 999)),
    )


PROPERTIES = [check_values_and_gradients, check_adjoint, check_one_exchange_each_way]


@pytest.mark.parametrize("check", PROPERTIES, ids=lambda check: check.__name__)
@given(case=routed_cases())
def test_every_routed_bridge(check: Callable[[RoutedCase], None], case: RoutedCase) -> None:
    check(case)
