# SPDX-License-Identifier: Apache-2.0
"""Rows as leaves: a pipeline's backward passes end at them, and their gradients go on later.

Each piece of the moved rows becomes a leaf of its own, one per microbatch, when the rows have
arrived (:meth:`Leaves.land`). Once all of them have gradients, :meth:`Leaves.send_back` starts
taking these to where the rows came from, and :meth:`Leaves.backward` goes on from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from megatron.core.models.mimo.comm.exchange import Flight
from mimo_colocated import phases


class Leaves:
    """The rows of several microbatches, cut off, and the way back for their gradients."""

    def __init__(self) -> None:
        self._coming: list[_Coming] = []
        self._ends: list[_End] = []

    def cut(
        self, rows: torch.Tensor, indices: list[torch.Tensor], offloaded: Any
    ) -> list[torch.Tensor]:
        """Return one leaf per piece of the rows.

        Args:
            rows: ``(n, H)``; they themselves are not kept.
            indices: of each piece, int64 places among the rows; no place twice.
            offloaded: activations on the host that the rows' backward pass reads, if there are any.
        """
        pieces = Pieces(indices)
        self._cut([pieces], [rows], [], offloaded)
        return pieces.leaves

    def cut_when_landed(
        self, parts: Sequence[tuple[Flight, list[torch.Tensor]]], offloaded: Any, name: str
    ) -> list[Pieces]:
        """Return the pieces of several flights of the same rows; :meth:`land` cuts them.

        Their gradients go on in one backward pass, so what made the rows runs backward once.

        Args:
            parts: of each flight, the ``indices`` of :meth:`cut`.
            offloaded: as for :meth:`cut`.
            name: of the modality, which runs backward once, however many times its rows moved.
        """
        pieces = [Pieces(indices) for _, indices in parts]
        flights = [flight for flight, _ in parts]
        self._coming.append(_Coming(pieces, flights, offloaded, name, torch.is_grad_enabled()))
        return pieces

    def land(self) -> None:
        """Wait for the rows that are on their way, and cut them."""
        coming, self._coming = self._coming, []
        for each in coming:
            with torch.set_grad_enabled(each.grad_enabled):
                rows = [flight.arrive() for flight in each.flights]
                edges = [flight.edge for flight in each.flights if flight.edge is not None]
                self._cut(each.pieces, rows, edges, each.offloaded, each.name)

    def send_back(self) -> None:
        """Start the exchanges of the leaves' gradients, once; nothing waits for them.

        The rows that were cut last go first: all ranks enter the exchanges in one order. Rows that
        moved otherwise than by a flight are left to :meth:`backward`.
        """
        self.land()
        if any(each.edges and each.gradients is None for each in self._ends):
            phases.mark(phases.BRIDGE_BACKWARD)
        for each in reversed(self._ends):
            if each.edges and each.gradients is None:
                each.gradients = torch.autograd.grad(each.scalar, each.edges)

    def backward(self) -> None:
        """Send the leaves' gradients on, once. Without rows that need a gradient do nothing.

        The rows that were cut last go first.
        """
        self.send_back()
        ends, self._ends = self._ends, []
        if any(not each.edges for each in ends):
            phases.mark(phases.BRIDGE_BACKWARD)
        # One backward pass of a modality gives each weight one gradient, which is what DDP counts,
        # summed in the order in which it would be if all its rows had moved together.
        together: dict[Any, list[_End]] = {}
        for each in reversed(ends):
            together.setdefault(each.name if each.edges else each, []).append(each)
        for group in together.values():
            offloaded = [each.offloaded for each in group if each.offloaded is not None]
            if offloaded:
                # Not before: gradients that were sent back may be on their way for long.
                offloaded[0].start_reload()
            if group[0].edges:
                edges = [edge for each in group for edge in each.edges]
                gradients = [one for each in group for one in each.gradients or ()]
                torch.autograd.backward(edges, gradients)
            else:
                group[0].scalar.backward()

    def _cut(
        self,
        pieces: list[Pieces],
        rows: list[torch.Tensor],
        edges: list[Any],
        offloaded: Any,
        name: str = "",
    ) -> None:
        for each, row in zip(pieces, rows, strict=True):
            each.requires_grad = row.requires_grad
        end = _HandOver.apply(pieces, *rows)
        if end.requires_grad:
            self._ends.append(_End(end, edges, offloaded, name))


@dataclass(frozen=True, eq=False)
class _Coming:
    """Rows on their way; see :meth:`Leaves.cut_when_landed`."""

    pieces: list[Pieces]
    flights: list[Flight]
    offloaded: Any
    name: str
    grad_enabled: bool


@dataclass(eq=False)
class _End:
    """Where the way back begins: ``scalar``; and where it is cut in two: the flights' ``edges``.

    ``gradients`` there are known once the first half was walked. ``offloaded``: what the second
    half reads from the host, if anything. ``name``: of the modality that runs backward there.
    """

    scalar: torch.Tensor
    edges: list[Any]
    offloaded: Any
    name: str
    gradients: Sequence[torch.Tensor] | None = None


class Pieces:
    """All rows, cut into one leaf per piece.

    Attributes:
        leaves: one per piece, once the rows have landed.
    """

    def __init__(self, indices: list[torch.Tensor]) -> None:
        self.indices, self.requires_grad = indices, False
        self.leaves: list[torch.Tensor] = []
        self._size: Any = None

    def cut(self, rows: torch.Tensor) -> None:
        """Copy each piece out of all of them."""
        self._size = rows.size()
        cut = [rows.detach().index_select(0, index) for index in self.indices]
        self.leaves = [piece.requires_grad_(self.requires_grad) for piece in cut]

    def take_gradients(self) -> torch.Tensor:
        """Those of all rows; zeros where a microbatch's loss does not depend on a row."""
        whole = self.leaves[0].new_zeros(self._size)
        for index, leaf in zip(self.indices, self.leaves, strict=True):
            if leaf.grad is not None:
                whole.index_copy_(0, index, leaf.grad)
                leaf.grad = None
        return whole


class _HandOver(torch.autograd.Function):
    """Rows -> a scalar to start backward from.

    forward:  the rows become leaves; they themselves are not kept
    backward: the leaves' gradients, put together
    """

    @staticmethod
    def forward(ctx: Any, pieces: Sequence[Pieces], *rows: torch.Tensor) -> torch.Tensor:
        ctx.pieces = pieces
        for each, row in zip(pieces, rows, strict=True):
            each.cut(row)
        return rows[0].new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, *(each.take_gradients() for each in ctx.pieces)
