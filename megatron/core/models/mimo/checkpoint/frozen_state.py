# SPDX-License-Identifier: Apache-2.0
"""Optimizer state in checkpoints of runs in which some parameters do not train.

==============  ==============  ==========================================================
when saved      when loaded     the parameter's optimizer state
==============  ==============  ==========================================================
trained         trained         is read
frozen          trained         starts fresh: zero moments, main copy made from the weight
trained         frozen          is not read
==============  ==============  ==========================================================

A checkpoint stores a stack of layers as one tensor per weight. Where only some layers of a stack
train, the others' part is filled with zeros, since a tensor in a checkpoint must be whole.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.models.mimo.checkpoint.global_tensors import different_parts

FRESH = "_mimo_fresh"
# <module and chain>.optimizer.state.<kind>.<name of the weight in the model's state>
_KEY = re.compile(r"(mimo\..*?optimizer\.state)\.([^.]+)\.(.+)")
_MAIN_COPIES = ("param", "fp32_param")


@dataclass(frozen=True)
class Frozen:
    """What does not train in a run, by the names of the model's state; the same on all ranks.

    Attributes:
        names: weights of which no layer trains.
        partly: weights of a stack of which some layers train -> the tensors kept of those, as
            (key prefix, kind, dtype).
    """

    names: frozenset[str]
    partly: dict[str, tuple[tuple[str, str, torch.dtype], ...]]

    @classmethod
    def find(cls, model_state: dict, optimizer_state: dict) -> Frozen:
        """Ask all ranks: pipeline stages hold other layers. Costs next to nothing if all trains."""
        frozen = {e.key for e in _entries(model_state) if _is_frozen(e)}
        if not _any_rank(bool(frozen), model_state):
            return cls(frozenset(), {})
        trained = {e.key for e in _entries(model_state) if _is_trained(e)}
        kinds: dict[str, set] = {}
        for entry in _entries(optimizer_state):
            prefix, kind, name = _parts_of(entry.key)
            kinds.setdefault(name, set()).add((prefix, kind, entry.data.dtype))
        mine = (frozen, trained, kinds)
        digest = hashlib.sha256(repr(_ordered(mine)).encode()).hexdigest()
        told = list(different_parts(mine, digest).values())
        frozen, trained = (set().union(*(each[i] for each in told)) for i in (0, 1))
        partly = {}
        for name in sorted(frozen & trained):
            found = set().union(*(each[2].get(name, set()) for each in told))
            partly[name] = tuple(sorted(found, key=str))
        return cls(frozenset(frozen - trained), partly)


def whole_stacks(
    frozen: Frozen, model_state: dict, skip: frozenset[str] = frozenset()
) -> dict[str, Any]:
    """Return tensors that complete the optimizer state of stacks in which some layers are frozen.

    Args:
        frozen: of this run.
        model_state: the model's sharded state.
        skip: names that the checkpoint to load has nothing of.
    """
    found: dict[str, Any] = {}
    for number, entry in enumerate(_entries(model_state)):
        if not _is_frozen(entry) or entry.key in skip:
            continue
        for prefix, kind, dtype in frozen.partly.get(entry.key, ()):
            is_weight = kind in _MAIN_COPIES
            weight = entry.data.detach()
            data = weight.to(dtype) if is_weight else torch.zeros_like(weight, dtype=dtype)
            found[f"{kind}.{number}"] = _with_data(entry, f"{prefix}.{kind}.{entry.key}", data)
    return found


def start_fresh(
    optimizer_state: dict[str, Any], model_state: dict, names: frozenset[str]
) -> dict[str, Any]:
    """Return a request for ``optimizer_state``, of a checkpoint in which ``names`` were frozen.

    What the checkpoint does not hold is replaced by what a fresh run has. The main copy is the
    weight itself: it holds what was loaded by the time the optimizer loads.

    Returns:
        The request; a module of which nothing was trained is ``{FRESH: ...}``.
    """
    weights = {}
    for entry in _entries(model_state):
        weights.setdefault(entry.key, {})[_place(entry)] = entry.data.detach()
    request = {}
    for module, state in optimizer_state.items():
        keys = {_parts_of(e.key)[2] for e in _entries(state)}
        if keys and keys <= names:
            request[module] = {FRESH: LocalNonpersistentObject(True)}
        else:
            request[module] = _replaced(state, weights, names)
    return request


def _replaced(state: Any, weights: dict[str, dict], names: frozenset[str]) -> Any:
    if isinstance(state, dict):
        return {key: _replaced(value, weights, names) for key, value in state.items()}
    if isinstance(state, list):  # its places would be lost when some of it is not loaded
        return {key: _replaced(value, weights, names) for key, value in enumerate(state)}
    if not isinstance(state, (ShardedTensor, ShardedTensorFactory)):
        return state
    _, kind, name = _parts_of(state.key)
    if name not in names:
        return state
    is_weight = kind in _MAIN_COPIES
    values: Any = state.data
    data = weights[name][_place(state)] if is_weight else torch.zeros_like(values)
    return LocalNonpersistentObject(data)


def _entries(state: Any) -> Iterator[Any]:
    """Its sharded tensors and factories; Any, as stock declares that their data may be None."""
    for value in nested_values(state):
        if isinstance(value, (ShardedTensor, ShardedTensorFactory)):
            yield value


def _parts_of(key: str) -> tuple[str, str, str]:
    """(prefix, kind, name) of an optimizer state's key."""
    match = _KEY.fullmatch(key)
    assert match is not None, key
    return match[1], match[2], match[3]


def _place(entry: ShardedTensor | ShardedTensorFactory) -> Any:
    """Where in the whole tensor an entry is; tells the layers of a stack apart."""
    if isinstance(entry, ShardedTensor):
        return entry.global_offset
    return tuple(part.global_offset for part in nested_values(entry.build()))


def _is_frozen(entry: ShardedTensor | ShardedTensorFactory) -> bool:
    return isinstance(entry.data, torch.nn.Parameter) and not entry.data.requires_grad


def _is_trained(entry: ShardedTensor | ShardedTensorFactory) -> bool:
    return isinstance(entry.data, torch.nn.Parameter) and entry.data.requires_grad


def _with_data(entry: Any, key: str, data: torch.Tensor) -> Any:
    if isinstance(entry, ShardedTensorFactory):
        return replace(entry, key=key, data=data)
    return replace(entry, key=key, data=data, dtype=data.dtype)


def _any_rank(flag: bool, model_state: dict) -> bool:
    device = next((entry.data.device for entry in _entries(model_state)), None)
    value = torch.tensor([float(flag)], device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())


def _ordered(value: Any) -> Any:
    """Equal values in one order: sets have none of their own."""
    if isinstance(value, dict):
        return sorted((str(key), _ordered(item)) for key, item in value.items())
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    return [_ordered(item) for item in value] if isinstance(value, (list, tuple)) else value
