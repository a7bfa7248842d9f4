# SPDX-License-Identifier: Apache-2.0
"""Whole logits and whole batches, gathered from what every rank has; no gradient."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist

from megatron.core.models.mimo.job.packing import padded_lengths
from megatron.core.models.mimo.partition.sequence_order import dense_positions, packed_positions
from megatron.core.process_groups_config import ProcessGroupCollection


def gather(tensor: torch.Tensor, group: dist.ProcessGroup, dim: int) -> torch.Tensor:
    """Concatenate the group's tensors, of one shape, along ``dim``; no gradient."""
    if group.size() == 1:
        return tensor
    own = tensor.contiguous()[None]
    parts = own.new_empty(group.size(), *tensor.shape)
    dist.all_gather_into_tensor(parts, own, group=group)
    return torch.cat(parts.unbind(), dim=dim)


def whole_logits(logits: torch.Tensor, groups: ProcessGroupCollection) -> torch.Tensor:
    """Gather ``(b, S/cp, V/tp)`` of each rank into ``(b, S, V)``, in the order of positions.

    Args:
        logits: of this rank.
        groups: the language model's.
    """
    parts, cp = _gathered(logits, groups), groups.cp.size()
    return _ordered(parts, [dense_positions(parts.shape[1], rank, cp) for rank in range(cp)])


def whole_packed_logits(
    logits: torch.Tensor,
    groups: ProcessGroupCollection,
    lengths: Sequence[int],
    multiple: int,
    sequence_length: int,
) -> torch.Tensor:
    """Gather ``(1, T/cp, V/tp)`` of packed samples into ``(b, S, V)``, zeros where one is cut.

    Args:
        logits: of this rank.
        groups: the language model's.
        lengths: tokens of each sample.
        multiple: that padded lengths are multiples of.
        sequence_length: ``S``.
    """
    ends = np.cumsum([0, *padded_lengths(lengths, multiple)]).tolist()
    parts, cp = _gathered(logits, groups), groups.cp.size()
    whole = _ordered(parts, [packed_positions(ends, rank, cp) for rank in range(cp)])
    samples = whole.new_zeros(len(lengths), sequence_length, whole.size(2))
    for sample, start, length in zip(samples, ends, lengths, strict=False):
        sample[:length] = whole[0, start : start + length]
    return samples


def _gathered(logits: torch.Tensor, groups: ProcessGroupCollection) -> torch.Tensor:
    return gather(gather(logits, groups.tp, dim=2), groups.cp, dim=1)


def _ordered(parts: torch.Tensor, positions: Sequence[Sequence[int]]) -> torch.Tensor:
    whole = torch.empty_like(parts)
    whole[:, [place for rank in positions for place in rank]] = parts
    return whole
