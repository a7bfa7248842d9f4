# SPDX-License-Identifier: Apache-2.0
"""Rows over their planned routes, differentiable: issued, then waited for.

| function          | forward                            | backward                           |
|-------------------|------------------------------------|------------------------------------|
| ``issue_exchange``| starts an all-to-all of held rows  | waits for the gradients            |
| ``Flight.arrive`` | waits for own rows                 | starts an all-to-all of gradients  |

Each direction is one all-to-all with the uneven splits of a ``RoutePlan``; a direction in which no
rank of the group has anything to send is none. Autograd walks the two from the end, so what is
recorded between them (text embeddings) overlaps with the rows in forward and with their gradients
in backward.

As in ``collectives``: the incoming gradient is read, never written, and nothing runs in backward
unless the rows need a gradient. Nothing waits for the device: splits and indices come from the
host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from megatron.core.models.mimo.comm.plan.merged_routes import Routes
from megatron.core.models.mimo.uploads import upload
from mimo_colocated import phases


def to_device(arrays: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """Return index arrays as int64 tensors on a device, all in one copy that nobody waits for."""
    sizes = [array.size for array in arrays]
    flat = torch.from_numpy(np.concatenate([array.reshape(-1) for array in arrays]))
    return list(upload(flat, device).split(sizes))


@dataclass(frozen=True, eq=False)
class PlanTensors:
    """A :class:`.RoutePlan` (or merged ones) as the device needs it; see there for the indices.

    Attributes:
        held, own, local: numbers of rows.
        forward, backward: ``(send splits, receive splits)``; ``None`` if nobody sends.
        stays: nobody sends, and own rows are the held rows in their order: nothing to copy.
    """

    held: int
    own: int
    local: int
    forward: tuple[list[int], list[int]] | None
    backward: tuple[list[int], list[int]] | None
    stays: bool
    local_index: torch.Tensor
    send_index: torch.Tensor
    backward_send_index: torch.Tensor
    backward_index: torch.Tensor
    place: torch.Tensor

    @classmethod
    def of(cls, plan: Routes, device: torch.device) -> PlanTensors:
        """Upload a plan's indices; may be done ahead, in a data loader's thread."""
        there, back = (
            (leg.send_splits.tolist(), leg.recv_splits.tolist()) if leg.moves else None
            for leg in (plan.forward, plan.backward)
        )
        in_order = np.array_equal(plan.local_index, np.arange(plan.held))
        stays = there is None and back is None and in_order
        indices = to_device(
            [
                plan.local_index,
                plan.forward.send_index,
                plan.backward.send_index,
                plan.backward_index,
                plan.place,
            ],
            device,
        )
        return cls(plan.held, plan.own, plan.local_index.size, there, back, stays, *indices)


class Exchange:
    """The two all-to-alls of one exchange.

    The autograd graph has it, so it must not have anything of the graph: Python does not see, and
    so does not collect, a cycle that passes through the graph.
    """

    def __init__(self, plan: PlanTensors, group: dist.ProcessGroup | None) -> None:
        self.plan, self._group = plan, group
        # What a running all-to-all reads and writes lives until it was waited for.
        self._under_way: tuple[Any, torch.Tensor] | None = None
        self.gradients: torch.Tensor | None = None

    def start(self, into: torch.Tensor, rows: torch.Tensor, splits: Any) -> None:
        """Start an all-to-all."""
        sizes = {"output_split_sizes": splits[1], "input_split_sizes": splits[0]}
        work = dist.all_to_all_single(into, rows, **sizes, group=self._group, async_op=True)
        self._under_way = (work, rows)

    def wait(self) -> None:
        """Wait for the one that was started, if any: the host on the CPU, the stream on a GPU."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way[0].wait()


class Flight:
    """Rows on their way; see :func:`issue_exchange`.

    Attributes:
        edge: where the way back may be cut in two, between starting to send gradients and waiting
            for them: a ``GradientEdge``, or ``None`` if the rows need no gradient.
    """

    def __init__(self, rows: torch.Tensor, exchange: Exchange) -> None:
        self._rows: torch.Tensor | None = rows
        self._exchange, self.plan = exchange, exchange.plan
        wanted = rows.requires_grad
        self.edge: Any = torch.autograd.graph.get_gradient_edge(rows) if wanted else None

    @property
    def place(self) -> torch.Tensor:
        """Where the own rows go, see :class:`.RoutePlan`."""
        return self.plan.place

    def arrive(self) -> torch.Tensor:
        """Return the own rows ``(own, H)``, in the order of the plan's ``place``; call it once.

        forward:  waits for the rows
        backward: starts sending the own rows' gradients to all ranks that hold a copy of the row
        """
        rows, self._rows = self._rows, None
        assert rows is not None, "a flight arrives once"
        return rows if self.plan.stays else _Arrive.apply(rows, self._exchange)


def issue_exchange(
    rows: torch.Tensor, plan: PlanTensors, group: dist.ProcessGroup | None
) -> Flight:
    """Start moving held rows to the ranks that own them; every rank of the group calls it.

    forward:  ``rows: (held, H)``  ->  own rows ``(own, H)``, see :meth:`Flight.arrive`
    backward: gradients of own rows  ->  ``(held, H)``, every row's whole gradient

    The naive adjoint sums what comes back, since each copy of a row was used. But consumers with
    copies (the TP ranks of an owner) hold the same whole gradient, and so must every copy of the
    encoder's row: each holder is sent it once.

    Args:
        rows: this rank's encoder output, equal on all TP ranks of its replica. A rank without
            rows brings ``(0, H)``; ``requires_grad``, dtype and ``H`` are those of its group.
        plan: of this rank, for these rows.
        group: the exchange group; ``None`` if this rank is alone in it.

    Raises:
        ValueError: another number of rows than planned.
    """
    if rows.ndim != 2 or rows.size(0) != plan.held:
        raise ValueError(
            f"The plan is for {plan.held} rows of this rank, got a tensor {tuple(rows.shape)}; "
            "give the rows (n, H) that the plan was made for"
        )
    exchange = Exchange(plan, group)
    return Flight(rows if plan.stays else _Issue.apply(rows, exchange), exchange)


class _Issue(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, exchange: Exchange) -> torch.Tensor:
        ctx.exchange, plan = exchange, exchange.plan
        own = rows.new_empty((plan.own, rows.size(1)))
        torch.index_select(rows, 0, plan.local_index, out=own[: plan.local])
        if plan.forward is not None:
            exchange.start(own[plan.local :], rows.index_select(0, plan.send_index), plan.forward)
        return own

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None]:
        exchange, plan = ctx.exchange, ctx.exchange.plan
        phases.mark(phases.BRIDGE_BACKWARD)
        exchange.wait()
        received, exchange.gradients = exchange.gradients, None
        dx = dy.new_empty((plan.held, dy.size(1)))
        dx.index_copy_(0, plan.local_index, dy[: plan.local])
        if received is not None:
            dx.index_copy_(0, plan.backward_index, received)
        return dx, None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: torch.Tensor, exchange: Exchange) -> torch.Tensor:
        ctx.exchange = exchange
        with phases.during(phases.BRIDGE_FORWARD):
            exchange.wait()
        return own.view_as(own)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None]:
        exchange, plan = ctx.exchange, ctx.exchange.plan
        if plan.backward is not None:
            with phases.during(phases.BRIDGE_BACKWARD):
                exchange.gradients = dy.new_empty((plan.backward_index.numel(), dy.size(1)))
                gradients = dy.index_select(0, plan.backward_send_index)
                exchange.start(exchange.gradients, gradients, plan.backward)
        return dy, None
