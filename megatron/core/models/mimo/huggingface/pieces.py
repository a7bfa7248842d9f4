# SPDX-License-Identifier: Apache-2.0
"""Which rank has which part of a folder's tensors: the runs of an import, read the other way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from megatron.core.models.mimo.huggingface.all_ranks import on_all_ranks
from megatron.core.models.mimo.huggingface.cuts import Run
from megatron.core.models.mimo.huggingface.folder import Described, FolderError
from megatron.core.models.mimo.huggingface.weights import Held, Part
from megatron.core.models.mimo.training.agreement import gathered


@dataclass(frozen=True, order=True)
class Piece:
    """Neighbouring rows of a tensor along one of its dims, and where they are.

    Attributes:
        start: first row in the tensor.
        size: number of rows.
        rank: that has them.
        held: which of the rank's parameters.
        at: first row in the rank's parameter.
        source: which of the parameter's source tensors this is.
        dim: of the tensor.
    """

    start: int
    size: int
    rank: int
    held: int
    at: int
    source: int
    dim: int

    @property
    def run(self) -> Run:
        """The run of the rank's parameter."""
        return Run(self.source, self.start, self.at, self.size)

    def where(self) -> tuple[slice, ...]:
        """Return its place in the tensor."""
        return (*([slice(None)] * self.dim), slice(self.start, self.start + self.size))

    def shape(self, described: Described) -> list[int]:
        """Return its shape."""
        shape = list(described.shape)
        shape[self.dim] = self.size
        return shape


@dataclass(frozen=True)
class Planned:
    """A tensor that is written.

    Attributes:
        name: of the tensor.
        described: file, dtype and shape to be.
        pieces: that make it, in the order of their rows; none of a tensor that is copied.
    """

    name: str
    described: Described
    pieces: tuple[Piece, ...]


def plan(
    held: Sequence[Held],
    parts: Sequence[Part],
    outline: Mapping[str, Described],
    dtype: torch.dtype | None = None,
) -> list[Planned]:
    """Say of every tensor of a folder where its elements come from; all ranks call it together.

    Args:
        held: this rank's parameters.
        parts: of the model, on every rank the same.
        outline: name -> the tensor to be, in the order of writing.
        dtype: of the tensors that the model has, in place of the outline's.

    Returns:
        The same list on all ranks.

    Raises:
        FolderError: the same on all ranks: a tensor that no rank has a part of, or has too much of.
    """
    own = on_all_ranks(lambda: _of_this_rank(held, outline), "name its part of the tensors")
    pieces = _of_all_ranks(own)
    for name, other in _repeated(parts):
        if name in outline and other in pieces:
            pieces[name] = pieces[other]
    alone = {name for part in parts for name in part.table.left_alone(outline)}
    planned = []
    for name, described in outline.items():
        own = _without_copies(pieces.get(name, ()))
        if own or name not in alone:
            _check_whole(name, described, own)
            described = _cast(described, dtype)
        planned.append(Planned(name, described, own))
    return planned


def _of_this_rank(held: Sequence[Held], outline: Mapping[str, Described]) -> list[tuple]:
    own = []
    for number, each in enumerate(held):
        if not each.first_copy:
            continue
        for run in each.runs(outline):
            name = each.source.names[run.source]
            dim = len(each.where(run, outline[name])) - 1
            own.append((name, run.start, run.size, number, run.at, run.source, dim))
    return own


def _of_all_ranks(own: list[tuple]) -> dict[str, list[Piece]]:
    found: dict[str, list[Piece]] = {}
    for rank, said in enumerate(gathered(own)):
        for name, start, size, *rest in said:
            found.setdefault(name, []).append(Piece(start, size, rank, *rest))
    return found


def _repeated(parts: Iterable[Part]) -> list[tuple[str, str]]:
    return [pair for part in parts for pair in part.table.repeated]


def _without_copies(pieces: Iterable[Piece]) -> tuple[Piece, ...]:
    """One piece of those with the same rows: a tied embedding is on two pipeline stages."""
    kept: list[Piece] = []
    for piece in sorted(pieces):
        if not kept or (piece.start, piece.size) != (kept[-1].start, kept[-1].size):
            kept.append(piece)
    return tuple(kept)


def _check_whole(name: str, described: Described, pieces: Sequence[Piece]) -> None:
    """Make sure that the pieces are every row once."""
    end = 0
    for piece in pieces:
        if piece.start != end:
            break
        end += piece.size
    length = described.shape[pieces[0].dim] if pieces else 1
    if end != length or sum(piece.size for piece in pieces) != length:
        raise FolderError(
            f"'{name}' {list(described.shape)} cannot be written: the ranks have {end} of its "
            f"{length} rows in order; the model's tables do not name all of it (docs/models.md)"
        )


def _cast(described: Described, dtype: torch.dtype | None) -> Described:
    if dtype is None or not described.dtype.is_floating_point:
        return described
    return Described(described.file, dtype, described.shape)
