# SPDX-License-Identifier: Apache-2.0
"""Which tensors a checkpoint holds, over all ranks.

A rank describes what it has itself: a pipeline stage its own parameters, a rank outside a
module's grid nothing of that module. What identifies the model, and what it takes on the disk,
is what all of them have together.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from typing import Any

import torch.distributed as dist

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.models.mimo.training.agreement import gathered

# Key of a tensor -> (its global shape, bytes of an element).
Described = dict[str, tuple[list[int], int]]


def described(state: dict[str, Any]) -> Described:
    """Return the tensors of a sharded state as this rank describes them."""
    return {t.key: (list(t.global_shape), t.dtype.itemsize) for t in _sharded_tensors(state)}


def _sharded_tensors(state: dict[str, Any]) -> Iterable[ShardedTensor]:
    for value in nested_values(state):
        if isinstance(value, ShardedTensorFactory):
            yield from _sharded_tensors({"built": value.build()})
        elif isinstance(value, ShardedTensor):
            yield value


def of_all_ranks(own: Described) -> Described:
    """Return what any rank describes, the same on all ranks, which call it together.

    Args:
        own: what this rank describes.

    Raises:
        ValueError: on all ranks if two describe a tensor differently.
    """
    parts = different_parts(own, _digest(own))
    return own if len(parts) == 1 else joined(parts)


def different_parts(own: Any, digest: str) -> dict[int, Any]:
    """Return what ranks have to say, each of it once, under the first rank that does.

    The ranks exchange digests. Of those that say the same, as all data parallel replicas of a
    stage do, only the first sends it, and nobody does where all are the same.

    Args:
        own: what this rank says.
        digest: of it, the same for equal ones.
    """
    first = {each: rank for rank, each in reversed(list(enumerate(gathered(digest))))}
    if len(first) == 1:
        return {0: own}
    parts: dict[int, Any] = {}
    for rank in sorted(first.values()):
        part = [own]
        dist.broadcast_object_list(part, src=rank)
        parts[rank] = part[0]
    return parts


def joined(parts: dict[int, Described]) -> Described:
    """Return what ranks describe, in one, sorted by key.

    Args:
        parts: rank -> what it describes.

    >>> joined({0: {"b": ([4, 2], 4)}, 2: {"a": ([8], 4), "b": ([4, 2], 4)}})
    {'a': ([8], 4), 'b': ([4, 2], 4)}

    Raises:
        ValueError: two ranks describe a tensor differently.
    """
    found: Described = {}
    holder: dict[str, int] = {}
    for rank, part in parts.items():
        for key, (shape, size) in part.items():
            if found.setdefault(key, (shape, size)) != (shape, size):
                other_shape, other_size = found[key]
                raise ValueError(
                    f"'{key}' is {other_shape} of {other_size} bytes each on rank {holder[key]} "
                    f"and {shape} of {size} bytes each on rank {rank}; build all pipeline stages "
                    "from one configuration"
                )
            holder.setdefault(key, rank)
    return dict(sorted(found.items()))


def shapes(tensors: Described) -> dict[str, list[int]]:
    """Return key -> global shape."""
    return {key: shape for key, (shape, _) in tensors.items()}


def total_bytes(tensors: Described) -> int:
    """Return the bytes of whole tensors, whoever writes them.

    >>> total_bytes({"a": ([2, 3], 4), "b": ([5], 2)})
    34
    """
    return sum(math.prod(shape) * size for shape, size in tensors.values())


def _digest(own: Described) -> str:
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()
