# SPDX-License-Identifier: Apache-2.0
"""Bridges between small grids, and the global picture of what must move over them.

The rows and the gradient of the fused sequence are functions of the exchange group, so every rank
can draw all of them. What a rank must get follows from its coordinates by ``dense_positions``.
Data is only copied, so every comparison is bit for bit. For real ranks and for played ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.models.mimo.comm.plan.routes import RoutePlan, plan_routes
from megatron.core.models.mimo.comm.plan.token_runs import TokenRuns
from megatron.core.models.mimo.comm.routed_bridge import RoutedBridge
from megatron.core.models.mimo.partition.sequence_order import dense_positions

POWERS = (1, 2, 4, 8)
HIDDEN = 3
FAN_IN, FAN_OUT, EQUAL = ((2, 4), (2, 2, 2)), ((4, 2), (1, 2, 4)), ((4, 2), (2, 2, 2))


@contextlib.contextmanager
def bridge(
    src: tuple[int, int],
    dest: tuple[int, int, int],
    wait: Callable[[], Any] = lambda: None,
    **options: Any,
) -> Iterator[RoutedBridge]:
    """A bridge between fresh grids, (tp, dp) and (tp, cp, dp); gone afterwards.

    ``wait``: for all ranks, so that none destroys a group while another one still connects.
    """
    grids = HyperCommGrid(list(src), ["tp", "dp"]), HyperCommGrid(list(dest), ["tp", "cp", "dp"])
    made = RoutedBridge(*grids, "images", "language", **options)
    wait()
    try:
        yield made
    finally:
        wait()
        made.destroy()
        for grid in grids:
            grid.destroy()


class Picture:
    """Global rows and gradients ``(N, H)`` of a batch whose samples have the given masks."""

    def __init__(
        self,
        made: RoutedBridge,
        masks: Sequence[np.ndarray],
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float64,
        cuts: Sequence[int] | None = None,
    ) -> None:
        layout, me = made.layout, dist.get_rank()
        self.group = layout.group_of(me)
        self.tokens = [TokenRuns.from_mask(masks[dp]) for dp in self.group.dest_dps]
        counts = [each.count for each in self.tokens]
        total, replicas = sum(counts), self.group.src_dps.size
        if cuts is None:
            cuts = [total * part // replicas for part in range(1, replicas)]
        self.bounds = [0, *cuts, total]
        generator = torch.Generator().manual_seed(20 + int(self.group.ranks[0]))
        shape = (2, total, HIDDEN)
        self.rows, self.gradient = torch.randn(shape, generator=generator).to(device, dtype)
        src, dest = self.group.src_of[self.group.index(me)], self.group.dest_of
        self.mine = slice(self.bounds[src], self.bounds[src + 1])
        replica = dest[self.group.index(me)]
        self.own_tokens, first = self.tokens[replica], sum(counts[:replica])
        # Row of each place of the replica's batch, then of each place of this rank's part.
        rows = np.full(masks[0].size, -1)
        rows[self.own_tokens.positions()] = first + np.arange(self.own_tokens.count)
        place = me - layout.rank_offset
        tp = layout.dest_tp_size if layout.sequence_parallel else 1
        kept = dense_positions(
            masks[0].shape[1],
            int(layout.dest_cp[place]),
            layout.dest_cp_size,
            int(layout.dest_tp[place]) % tp,
            tp,
        )
        self.at = torch.from_numpy(rows.reshape(masks[0].shape)[:, kept].T.reshape(-1))

    @property
    def held(self) -> list[int]:
        return np.diff(self.bounds).tolist()

    def plan(self, made: RoutedBridge) -> RoutePlan:
        return plan_routes(made.layout, dist.get_rank(), self.tokens, self.held)

    def local(self, values: torch.Tensor) -> torch.Tensor:
        """``values`` at this rank's places, zero where no row belongs."""
        at = self.at.to(values.device)
        padded = torch.cat([values, values.new_zeros(1, HIDDEN)])
        return padded[torch.where(at < 0, len(values), at)]

    def run(self, made: RoutedBridge, plan: RoutePlan) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows at their places, gradient of the held rows)."""
        held = self.rows[self.mine].clone().requires_grad_()
        own = made.move(held, plan)
        place = made.tensors(plan, held.device).place
        fused = held.new_zeros(len(self.at), HIDDEN).index_copy(0, place, own)
        gradient = self.local(self.gradient)
        fused.backward(gradient)
        assert torch.equal(gradient, self.local(self.gradient))
        return fused.detach(), held.grad

    def check(self, made: RoutedBridge, plan: RoutePlan | None = None) -> None:
        """Move the rows and their gradients and compare both with the picture."""
        plan = plan or made.plan(self.own_tokens, self.rows[self.mine].requires_grad_(True))
        fused, gradient = self.run(made, plan)
        assert torch.equal(fused, self.local(self.rows.detach()))
        assert torch.equal(gradient, self.gradient[self.mine])


def random_masks(dest_dp: int, seq_len: int, batch: int = 3) -> list[np.ndarray]:
    """Uneven tokens per sample, samples without any, the second replica without any."""
    generator = np.random.default_rng(4)
    masks = [generator.random((batch, seq_len)) < 0.5 for _ in range(dest_dp)]
    for mask in masks:
        mask[generator.integers(batch)] = False
    if dest_dp > 1:
        masks[1][:] = False
    return masks
