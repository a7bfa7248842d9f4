# SPDX-License-Identifier: Apache-2.0
"""Ranks compare what they are about to do, and all raise the same error if it does not fit."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

_Judged = TypeVar("_Judged")
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def raise_on_all(problem: str, groups: list[dist.ProcessGroup]) -> None:
    """Raise a problem that any rank has, on every rank that ``groups`` connect.

    Args:
        problem: of this rank; empty if it has none.
        groups: one per dim of a box of ranks.

    Raises:
        ValueError: the first rank's problem that has one, with its ranks.
    """
    found = [(dist.get_rank(), problem)]
    for group in groups:
        gathered: list[Any] = [None] * group.size()
        dist.all_gather_object(gathered, found, group=group)
        found = [each for part in gathered for each in part]
    problems = {rank: each for rank, each in sorted(found) if each}
    if problems:
        first = next(iter(problems.values()))
        ranks = [rank for rank, each in problems.items() if each == first]
        where = "" if len(ranks) == len(found) else f"on ranks {ranks}: "
        raise ValueError(where + first)


def judged_together(
    judge: Callable[[], _Judged], group: dist.ProcessGroup, device: torch.device
) -> _Judged:
    """Return what ``judge`` returns, or raise on all ranks of a group what it raises on any.

    All ranks call it together. Where nothing is wrong one number is exchanged.

    Args:
        judge: without communication; raises a ``ValueError`` for what does not fit.
        group: the ranks.
        device: that the group communicates from.

    Raises:
        ValueError: the first rank's problem that has one, with its ranks.
    """
    judged, problem = [], ""
    try:
        judged.append(judge())
    except ValueError as error:
        problem = str(error)
    refused = torch.tensor([int(bool(problem))], device=device)
    dist.all_reduce(refused, op=dist.ReduceOp.MAX, group=group)
    if int(refused):
        raise_on_all(problem, [group])
    return judged[0]


def raise_if_different(what: str, digest: str, remedy: str, groups: list[Any]) -> None:
    """Raise on every rank if a digest is not the same on all ranks that ``groups`` connect.

    Args:
        what: is compared, in the plural.
        digest: of this rank's.
        remedy: what to do.
        groups: one per dim of a box of ranks.

    Raises:
        ValueError: names the ranks that differ from the first.
    """
    found = {dist.get_rank(): digest}
    for group in groups:
        gathered: list[Any] = [None] * group.size()
        dist.all_gather_object(gathered, found, group=group)
        found = {rank: each for part in gathered for rank, each in part.items()}
    first = min(found)
    others = [rank for rank in sorted(found) if found[rank] != found[first]]
    if others:
        raise ValueError(f"{what} of ranks {others} are not those of rank {first}; {remedy}")


def model_digest(model: nn.Module) -> str:
    """Return a digest of a model's parameters and buffers: names, shapes, dtypes, bits."""
    named = [*model.named_parameters(), *model.named_buffers()]
    lines = [f"{name} {tuple(t.shape)} {t.dtype} {t.requires_grad}" for name, t in named]
    # Sums of bits as integers: exact in any order, and read from the device at once.
    sums = [_bits(t).sum(dtype=torch.int64) for _, t in named if not t.is_meta]
    bits = torch.stack(sums).tolist() if sums else []
    return _hash([*lines, *map(str, bits)])


def batch_digest(inputs: Mapping[str, Any]) -> str:
    """Return a digest of a forward's arguments; the order of samples and tokens counts."""
    lines = []
    for name, value in sorted(inputs.items()):
        if torch.is_tensor(value):
            bits = _bits(value).flatten().long()
            weights = torch.arange(1, len(bits) + 1, device=bits.device)
            value = f"{tuple(value.shape)} {value.dtype} {int((bits * weights).sum())}"
        lines.append(f"{name} {value if isinstance(value, (str, int, float)) else type(value)}")
    return _hash(lines)


def _bits(tensor: Tensor) -> Tensor:
    plain = tensor.detach().contiguous()
    return plain.view(_INTEGERS[plain.itemsize])


def _hash(lines: list[str]) -> str:
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()
