# SPDX-License-Identifier: Apache-2.0
"""Samples of several lengths as one sequence, each padded to what CP and SP cut evenly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def padded_lengths(lengths: Sequence[int] | np.ndarray, multiple: int) -> np.ndarray:
    """Return tokens of packed samples with the padding that CP and SP need, int64 ``(samples,)``.

    >>> padded_lengths([11, 32, 17], 4).tolist()
    [12, 32, 20]
    """
    return -(-np.asarray(lengths) // multiple) * multiple


def pack(values: torch.Tensor, padded: np.ndarray) -> torch.Tensor:
    """Cut samples ``(b, S)`` to their padded lengths, one after another: ``(1, T)``."""
    rows = zip(values, padded.tolist(), strict=True)
    return torch.cat([row[:length] for row, length in rows]).unsqueeze(0)


def packing(lengths: Sequence[int], padded: np.ndarray) -> dict[str, Any]:
    """Return fields of ``PackedSeqParams`` for samples one after another.

    The cumulative lengths stay on the host, where they are read.

    Args:
        lengths: tokens of each sample that are no padding.
        padded: tokens of each sample in the packed sequence.
    """
    fields: dict[str, Any] = dict.fromkeys(("max_seqlen_q", "max_seqlen_kv"), int(padded.max()))
    for suffix, counts in (("", lengths), ("_padded", padded)):
        ends = torch.tensor(np.cumsum([0, *counts]), dtype=torch.int32)
        fields |= {f"cu_seqlens_q{suffix}": ends, f"cu_seqlens_kv{suffix}": ends}
    return fields


def packed_inputs(
    inputs: dict[str, torch.Tensor | None],
    lengths: Sequence[int],
    multiple: int,
) -> dict[str, Any]:
    """Return the model's inputs with all samples packed into one, and ``packing_kwargs``.

    Args:
        inputs: name -> ``(b, S)``; None stays None.
        lengths: tokens of each sample that are no padding.
        multiple: that padded lengths are multiples of.
    """
    padded = padded_lengths(lengths, multiple)
    packed: dict[str, Any] = {k: None if v is None else pack(v, padded) for k, v in inputs.items()}
    return {**packed, "packing_kwargs": packing(lengths, padded)}
