# SPDX-License-Identifier: Apache-2.0
"""Rows as leaves: a pipeline's backward passes end at them, and their gradients go on later.

Each piece of the moved rows becomes a leaf of its own, one per microbatch. Once all of them have
gradients, :meth:`Leaves.backward` takes these back to where the rows came from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from megatron.core.models.mimo.memory.offload import reload_when_needed
from mimo_colocated import phases


class Leaves:
    """The rows of several microbatches, cut off, and the way back for their gradients."""

    def __init__(self) -> None:
        self._ends: list[torch.Tensor] = []

    def cut(
        self, rows: torch.Tensor, indices: list[torch.Tensor], offloaded: Any
    ) -> list[torch.Tensor]:
        """Return one leaf per piece of the rows.

        Args:
            rows: ``(n, H)``; they themselves are not kept.
            indices: of each piece, int64 places among the rows; no place twice.
            offloaded: activations on the host that the rows' backward pass reads, if there are any.
        """
        (pieces,) = self.cut_together([(rows, indices)], offloaded)
        return pieces

    def cut_together(
        self, parts: Sequence[tuple[torch.Tensor, list[torch.Tensor]]], offloaded: Any
    ) -> list[list[torch.Tensor]]:
        """Return the leaves of several tensors that were made of the same rows.

        Their gradients go on in one backward pass, so what made the rows runs backward once.

        Args:
            parts: of each tensor, ``rows`` and ``indices`` of :meth:`cut`.
            offloaded: as for :meth:`cut`.
        """
        pieces = [_Pieces(indices, rows.requires_grad) for rows, indices in parts]
        end = _HandOver.apply(pieces, *(rows for rows, _ in parts))
        if end.requires_grad:
            self._ends.append(reload_when_needed(end, offloaded))
        return [each.leaves for each in pieces]

    def backward(self) -> None:
        """Send the leaves' gradients on, once. Without rows that need a gradient do nothing.

        The rows that were cut last go first: all ranks enter the exchanges in one order.
        """
        ends, self._ends = self._ends, []
        if ends:
            phases.mark(phases.BRIDGE_BACKWARD)
        for end in reversed(ends):
            end.backward()


class _Pieces:
    """All rows, cut into one leaf per piece."""

    def __init__(self, indices: list[torch.Tensor], requires_grad: bool) -> None:
        self.indices, self.requires_grad = indices, requires_grad
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
    def forward(ctx: Any, pieces: Sequence[_Pieces], *rows: torch.Tensor) -> torch.Tensor:
        ctx.pieces = pieces
        for each, row in zip(pieces, rows, strict=True):
            each.cut(row)
        return rows[0].new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, *(each.take_gradients() for each in ctx.pieces)
