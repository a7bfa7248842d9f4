# SPDX-License-Identifier: Apache-2.0
"""Where the tokens of each modality stand in a batch, and rows put into their places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from megatron.core.models.mimo.partition.packed_lengths import keep_lengths, unread_lengths
from megatron.core.models.mimo.uploads import Download

TEXT = "text"


@dataclass(frozen=True)
class TokenPositions:
    """Positions of text and of each modality in ``input_ids``.

    Attributes:
        batch: samples ``B``.
        seq_len: tokens ``S`` of a sample.
        positions: name -> int64 ``(n,)``, ascending positions in the flattened ``(B * S)``
            batch, on the device of ``input_ids``; ``"text"`` is everything that is no modality.
    """

    batch: int
    seq_len: int
    positions: dict[str, torch.Tensor]

    @classmethod
    def find(cls, input_ids: torch.Tensor, special_token_ids: Mapping[str, int]) -> TokenPositions:
        """Look for the special tokens in ``input_ids`` ``(B, S)``.

        One stable sort groups the positions; the counts reach the host in one synchronisation,
        and without special tokens there is none.
        """
        batch, seq_len = input_ids.shape
        flat = input_ids.reshape(-1)
        ids = list(dict.fromkeys(special_token_ids.values()))
        if not ids:
            everything = torch.arange(flat.numel(), device=flat.device)
            return cls(batch, seq_len, {TEXT: everything})
        group = torch.zeros_like(flat)
        for index, token_id in enumerate(ids, start=1):
            group.masked_fill_(flat == token_id, index)
        counts = torch.stack([(group == index).sum() for index in range(len(ids) + 1)]).tolist()
        pieces = torch.argsort(group, stable=True).split(counts)
        found = {name: pieces[1 + ids.index(i)] for name, i in special_token_ids.items()}
        return cls(batch, seq_len, {TEXT: pieces[0], **found})

    def count(self, name: str) -> int:
        """Return how many tokens of a modality (or of text) the batch holds."""
        return self.positions[name].numel()

    def place(self, rows: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Put every row where its token stands: name -> ``(n, H)`` becomes ``(S, B, H)``.

        The copies are exact, and the gradient of a row is the gradient of its place. Places of a
        modality without rows stay zero. The result has the dtype of the text rows (of the first
        modality, if there is no text); other rows are cast to it.

        Raises:
            ValueError: rows of different widths.
        """
        places = {}
        for name in rows:
            flat = self.positions[name]
            # Row b * S + s of the flattened batch is row s * B + b of the sequence-first result.
            places[name] = flat % self.seq_len * self.batch + flat // self.seq_len
        fused = fill_places(rows, places, self.seq_len * self.batch)
        return fused.view(self.seq_len, self.batch, -1)


class BatchReading:
    """What the host has to know of a language batch, on its way there.

    Started before encoders are launched and waited for afterwards, so that the device has their
    work while the host waits, once. What is on the host already is not waited for.

    Args:
        input_ids: ``(B, S)``.
        special_token_ids: modality -> the token whose places are wanted; empty for none.
        packing_kwargs: of a packed batch, whose lengths are wanted.

    Attributes:
        on_host: whether :meth:`arrive` waits for no device.
    """

    def __init__(
        self,
        input_ids: torch.Tensor,
        special_token_ids: Mapping[str, int],
        packing_kwargs: Mapping[str, Any] | None,
    ) -> None:
        self._names, self._ids = special_token_ids, list(dict.fromkeys(special_token_ids.values()))
        self._lengths = unread_lengths(packing_kwargs or {})
        codes = []
        if self._ids:
            codes = [torch.zeros_like(input_ids, dtype=torch.int16)]
            for code, token_id in enumerate(self._ids, start=1):
                codes[0].masked_fill_(input_ids == token_id, code)
        self._download = Download([*self._lengths, *codes])
        self.on_host = self._download.on_host

    def arrive(self) -> dict[str, np.ndarray]:
        """Wait; return modality -> where its tokens stand, bool ``(B, S)``."""
        copies = self._download.arrive()
        keep_lengths(self._lengths, copies[: len(self._lengths)])
        if not self._ids:
            return {}
        codes = copies[-1].numpy()
        return {name: codes == self._ids.index(i) + 1 for name, i in self._names.items()}


class LatestTokenPositions:
    """Finds token positions and keeps those of the last batch: one forward pass asks thrice."""

    def __init__(self) -> None:
        # To be cleared when the batch is done, or it would be kept.
        self.latest: tuple[torch.Tensor, int, dict[str, int], TokenPositions] | None = None

    def find(self, input_ids: torch.Tensor, special_token_ids: Mapping[str, int]) -> TokenPositions:
        """Return :meth:`TokenPositions.find` of a batch."""
        ids = dict(special_token_ids)
        version = -1 if input_ids.is_inference() else input_ids._version
        latest = self.latest
        if latest is not None and latest[0] is input_ids and latest[1:3] == (version, ids):
            return latest[3]
        rows = TokenPositions.find(input_ids, ids)
        self.latest = (input_ids, version, ids, rows)
        return rows


def fill_places(
    rows: Mapping[str, torch.Tensor], places: Mapping[str, torch.Tensor], size: int
) -> torch.Tensor:
    """Put rows into their places of ``(size, H)``, zeros elsewhere; see :class:`TokenPositions`.

    Args:
        rows: name -> ``(n, H)``.
        places: name -> int64 ``(n,)``; no place twice.
        size: how many places there are.

    Raises:
        ValueError: rows of different widths.
    """
    reference = rows[TEXT] if TEXT in rows else next(iter(rows.values()))
    widths = {name: row.size(-1) for name, row in rows.items()}
    if len(set(widths.values())) != 1:
        raise ValueError(
            f"Embeddings of all modalities must have the same hidden size, got {widths}; "
            "give each modality an input projection to the language model's hidden size"
        )
    wanted = [places[name] for name in rows]
    return _Fill.apply(size, reference.dtype, wanted, *rows.values())


class _Fill(torch.autograd.Function):
    """Each row is copied once, and each gradient once; concatenating first would do it twice."""

    @staticmethod
    def forward(
        ctx: Any,
        size: int,
        dtype: torch.dtype,
        places: Sequence[torch.Tensor],
        *rows: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(*places)
        ctx.dtypes = [each.dtype for each in rows]
        full = sum(place.numel() for place in places) == size
        make = rows[0].new_empty if full else rows[0].new_zeros
        filled = make((size, rows[0].size(-1)), dtype=dtype)
        for place, each in zip(places, rows, strict=True):
            filled.index_copy_(0, place, each.to(dtype))
        return filled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradients = [
            dy.index_select(0, place).to(dtype) if needed else None
            for place, dtype, needed in zip(
                ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[3:], strict=True
            )
        ]
        return None, None, None, *gradients
