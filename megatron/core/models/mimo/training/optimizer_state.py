# SPDX-License-Identifier: Apache-2.0
"""State of one module's optimizer, to a checkpoint and back.

The inner optimizers are stock's. What is here is what stock leaves to rank 0 (which need not hold
the module) and what its loaders get wrong with PyTorch's Adam.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, merge
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedBase,
    ShardedObject,
)
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from megatron.core.models.mimo.training.frozen_state import FRESH
from megatron.core.optimizer.optimizer import (
    ChainedOptimizer,
    MegatronOptimizer,
    param_group_identifier_keys,
)

_COMMON_KEY = "_mimo_common"
_MAIN_COPIES = "fp32_from_fp16_params"


def sharded_inner_state(
    optimizer: MegatronOptimizer,
    model_sharded_state_dict: dict,
    name: str,
    replica_id: tuple[int, ...],
    *,
    is_loading: bool,
    **kwargs: Any,
) -> dict[str, Any]:
    """Sharded state of a module's optimizer; all ranks of the module call it together.

    What is not a sharded tensor (parameter groups, step counts, the loss scaler) would land in
    the file that rank 0 alone writes; rank 0 does not hold every module when modules sit on
    different ranks, so it travels as one sharded object per module instead.

    Args:
        optimizer: the module's optimizer, or a chain.
        model_sharded_state_dict: of the whole model.
        name: the module's name; prefixes every key.
        replica_id: zeros on exactly one rank of the module, which writes what is not sharded.
        is_loading: the result is a request to load, not to save.
        **kwargs: ``metadata`` as in stock.
    """
    if is_loading:
        _give_adam_its_state(optimizer)
    with _padded_between_buckets(optimizer):
        state = optimizer.sharded_state_dict(model_sharded_state_dict, is_loading, **kwargs)
    if isinstance(state, list):
        state = dict(enumerate(state))
    sharded, common = extract_matching_values(state, lambda v: isinstance(v, ShardedBase))
    add_prefix_for_sharding(sharded, f"mimo.{name}.")
    sharded[_COMMON_KEY] = ShardedObject(
        f"mimo.{name}.common", _without_local(common), (1,), (0,), replica_id=replica_id
    )
    return sharded


@contextlib.contextmanager
def _padded_between_buckets(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Inside, what a distributed optimizer gathers has the padding that its buckets have.

    Stock puts the buckets together without it and then cuts parameters out at their padded places:
    from the second bucket of a module on, moments and main weights would be saved shifted.
    """
    inners = [
        inner
        for inner in getattr(optimizer, "chained_optimizers", [optimizer])
        if hasattr(inner, "get_parameter_state_dp_zero")
    ]
    for inner in inners:
        gather = inner.get_parameter_state_dp_zero
        inner.get_parameter_state_dp_zero = functools.partial(_gather_padded, inner, gather)
    try:
        yield
    finally:
        for inner in inners:
            del inner.get_parameter_state_dp_zero


def _gather_padded(inner: Any, gather: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Stock's gathered state by buffer and dtype, each tensor as long as its buffer."""
    state = gather(*args, **kwargs)
    for number, buffer in enumerate(inner.buffers if state is not None else ()):
        for tensors in state[number].values():
            for key, value in tensors.items():
                if torch.is_tensor(value):
                    tensors[key] = _spread(value, buffer)
    return state


def _spread(gathered: torch.Tensor, buffer: Any) -> torch.Tensor:
    """Buckets without padding, one after the other, put where they are in the buffer."""
    whole, start = gathered.new_zeros(buffer.numel), 0
    for bucket in buffer.buckets:
        size = bucket.numel_unpadded
        whole[bucket.offset : bucket.offset + size] = gathered[start : start + size]
        start += size
    return whole


def load_inner_state(optimizer: MegatronOptimizer, state: dict[str, Any], name: str) -> None:
    """Load what ``state_dict`` returned, or what a sharded state was loaded into.

    Raises:
        ValueError: settings of the parameter groups differ.
    """
    if FRESH in state:
        _start_anew(optimizer)
        return
    state = dict(state)
    common = state.pop(_COMMON_KEY, None)
    if common is not None:
        state = merge(common, state)
    state = _listed(state, optimizer)
    for part, inner in _parts(state, optimizer):
        _list_main_copies(part)
        _adopt_param_groups(part, inner, name)
    _load(optimizer, state)


def _start_anew(optimizer: MegatronOptimizer) -> None:
    """As before the first step, from the weights as they are."""
    for inner in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner.optimizer.state.clear()
        for group in inner.optimizer.param_groups:
            group.pop("step", None)  # where fused Adams count
    optimizer.reload_model_params()


def _list_main_copies(state: Any) -> None:
    """Make lists of what ``start_fresh`` made dicts of."""
    groups = state.get(_MAIN_COPIES) if isinstance(state, dict) else None
    if isinstance(groups, dict):
        state[_MAIN_COPIES] = [
            [group[index] for index in sorted(group)] for _, group in sorted(groups.items())
        ]


def _without_local(value: Any) -> Any:
    """A copy without what belongs to this rank alone; loading puts this run's own there.

    Tensors (a loss scale) are on the host: they are loaded as they were saved, and the device of
    another rank may not be there.
    """
    if isinstance(value, LocalNonpersistentObject):
        return None
    if isinstance(value, dict):
        return {key: _without_local(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_local(item) for item in value]
    return value.detach().cpu() if isinstance(value, torch.Tensor) else value


def _parts(state: Any, optimizer: MegatronOptimizer) -> list[tuple[dict, MegatronOptimizer]]:
    """Pairs of (state, optimizer), one per inner optimizer of a chain."""
    if isinstance(optimizer, ChainedOptimizer):
        chain = optimizer.chained_optimizers
        return list(zip(state, chain, strict=True)) if len(chain) > 1 else [(state, chain[0])]
    return [(state, optimizer)]


def _listed(state: dict, optimizer: MegatronOptimizer) -> Any:
    """Undo the index-keyed dict that a chain's list was saved as."""
    chained = isinstance(optimizer, ChainedOptimizer) and len(optimizer.chained_optimizers) > 1
    return [state[i] for i in sorted(state, key=int)] if chained else state


def _give_adam_its_state(optimizer: MegatronOptimizer) -> None:
    """Zero state for parameters of PyTorch's Adam that have none yet, as before its first step.

    Megatron's distributed optimizer reads the step count out of that state even to load into it.
    """
    chain = getattr(optimizer, "chained_optimizers", [optimizer])
    for adam in (inner.optimizer for inner in chain):
        if not isinstance(adam, (torch.optim.Adam, torch.optim.AdamW)):
            continue
        for param in (p for group in adam.param_groups for p in group["params"]):
            if param not in adam.state or not adam.state[param]:
                adam.state[param] = {
                    "step": torch.zeros((), dtype=torch.float32),
                    "exp_avg": torch.zeros_like(param),
                    "exp_avg_sq": torch.zeros_like(param),
                }


def _load(optimizer: MegatronOptimizer, state: Any) -> None:
    """Load ``state``, tensors of the distributed optimizer in a step of their own.

    PyTorch's Adam keeps its step count among its tensors, where Megatron's loader looks for a
    saved tensor of every name and finds none for it; it is set aside meanwhile. It comes back as
    a copy per parameter: the loader shares one tensor, which Adam would then advance once for
    every parameter in each step.
    """
    tensors = [
        (part.pop("param_state"), inner)
        for part, inner in _parts(state, optimizer)
        if isinstance(part, dict)
        and part.get("param_state_sharding_type") == "fully_reshardable"
        and "param_state" in part
    ]
    optimizer.load_state_dict(state)
    for param_state, inner in tensors:
        states = inner.optimizer.state.values()
        steps = [adam_state.pop("step", None) for adam_state in states]
        inner.load_parameter_state_from_fully_reshardable(param_state)
        for adam_state, step in zip(states, steps, strict=True):
            if step is not None:
                adam_state["step"] = step.clone()


def _adopt_param_groups(state: dict, optimizer: MegatronOptimizer, name: str) -> None:
    """Point loaded parameter groups at this run's parameters: their numbering is local.

    Groups are known by their settings. Where other parameters train than when the checkpoint was
    saved, one of this run's may be missing from it: its settings are this run's then.

    Raises:
        ValueError: the checkpoint has no group with the settings of one of this run's.
    """
    # The fp32 optimizer's state is the torch optimizer's own; the others nest it.
    inner_state = state.get("optimizer", state)
    if not isinstance(inner_state, dict) or "param_groups" not in inner_state:
        return
    current = optimizer.optimizer.state_dict()["param_groups"]
    loaded = {_settings(group): group for group in inner_state["param_groups"]}
    if not any(_settings(group) in loaded for group in current):
        raise ValueError(
            f"optimizer of module '{name}': the parameter groups of the checkpoint have the "
            f"settings {sorted(loaded, key=str)}, those of this run "
            f"{sorted(map(_settings, current), key=str)} (each {param_group_identifier_keys}); "
            "load it with the same multipliers of weight decay and learning rate"
        )
    steps = {key: value for g in loaded.values() for key, value in g.items() if key == "step"}
    inner_state["param_groups"] = [
        {**loaded.get(_settings(group), {**group, **steps}), "params": group["params"]}
        for group in current
    ]


def _settings(group: dict[str, Any]) -> tuple:
    """What Megatron-Core tells parameter groups apart by, under either of the names it uses."""
    return tuple(group.get(key, group.get(f"pre_{key}")) for key in param_group_identifier_keys)
