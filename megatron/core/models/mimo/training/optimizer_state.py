# SPDX-License-Identifier: Apache-2.0
"""State of one module's optimizer, to a checkpoint and back.

The inner optimizers are stock's. What is here is what stock leaves to rank 0 (which need not hold
the module) and what its loaders get wrong with PyTorch's optimizers; ``optimizer_savers`` has what
its savers get wrong.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import chain, zip_longest
from typing import Any

import torch

from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, merge
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedBase,
    ShardedObject,
)
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from megatron.core.models.mimo.training import optimizer_settings
from megatron.core.models.mimo.training.inner_optimizers import inner_optimizers
from megatron.core.models.mimo.training.optimizer_savers import (
    MAIN_COPIES,
    mended,
    model_weights,
)
from megatron.core.models.mimo.training.optimizer_shards import (
    SHARDS,
    check_place,
    load_shards,
    shards_of,
)
from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer

_COMMON_KEY = "_mimo_common"
_PARAMETERS = "parameters"
_MARK = "wd_mult"
_ABSENT = object()


def inner_state(optimizer: MegatronOptimizer) -> Any:
    """Return the module's whole state on this rank: stock's, shards and settings.

    Tensors are the optimizer's own, as PyTorch's ``state_dict`` has them. It fits the same rank of
    the same layout.
    """
    _give_first_state(optimizer)
    state = optimizer.state_dict()
    for part, inner in _parts(state, optimizer):
        told = optimizer_settings.record(inner)
        part[optimizer_settings.RECORD] = {**told, _PARAMETERS: _names(inner)}
        if hasattr(inner, "get_parameter_state_dp_zero"):
            part[SHARDS] = shards_of(inner)
    return state


def note_names(optimizer: MegatronOptimizer, modules: tuple[torch.nn.Module, ...]) -> None:
    """Remember what the parameters are called: a state on this rank has numbers for them."""
    names = {
        id(parameter): f"{number}.{key}"
        for number, module in enumerate(modules)
        for key, parameter in module.named_parameters()
    }
    for inner in inner_optimizers([optimizer]):
        inner.mimo_names = names


def _names(inner: Any) -> list[list[str | None]]:
    """Of the parameters that ``inner`` steps, by group, in its order."""
    known = getattr(inner, "mimo_names", {})
    if hasattr(inner, "model_fp32_groups"):
        groups = zip(inner.model_fp32_groups, inner.model_float16_groups, strict=True)
        return [[known.get(id(weight)) for weight in chain(*group)] for group in groups]
    weights = iter(model_weights(inner))
    sizes = [len(group["params"]) for group in inner.param_groups]
    return [[known.get(id(next(weights))) for _ in range(size)] for size in sizes]


def sharded_inner_state(
    optimizer: MegatronOptimizer,
    model_sharded_state_dict: dict,
    name: str,
    replica_id: tuple[int, ...],
    *,
    is_loading: bool,
    **kwargs: Any,
) -> dict[str, Any]:
    """Return the sharded state of a module's optimizer; all ranks of the module call it together.

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
    _give_first_state(optimizer)
    with mended(optimizer):
        state = optimizer.sharded_state_dict(model_sharded_state_dict, is_loading, **kwargs)
    if isinstance(state, list):
        state = dict(enumerate(state))
    for part, inner in _parts(_listed(state, optimizer), optimizer):
        part[optimizer_settings.RECORD] = optimizer_settings.record(inner)
    sharded: Any
    sharded, common = extract_matching_values(state, lambda v: isinstance(v, ShardedBase))
    add_prefix_for_sharding(sharded, f"mimo.{name}.")
    sharded[_COMMON_KEY] = ShardedObject(
        f"mimo.{name}.common", _without_local(common), (1,), (0,), replica_id=replica_id
    )
    return sharded


def load_inner_state(
    optimizer: MegatronOptimizer, state: Any, name: str, settings: str = optimizer_settings.RUN
) -> dict[str, Any] | None:
    """Load what ``inner_state`` returned, or what a sharded state was loaded into.

    Args:
        optimizer: the module's.
        state: is left as it is.
        name: of the module, for errors.
        settings: which of the parameter groups' settings count, see ``optimizer_settings``.

    Returns:
        The fields of the ``OptimizerConfig`` that it was saved with; ``None`` in older states,
        which did not record them.

    Raises:
        ValueError: the state is of another kind of optimizer or of another rank; all settings of
            the parameter groups differ and the saved ones are to count.
    """
    # What state_dict() returned stays the caller's: the next steps must not write into it.
    state = _copied(state, tensors=_COMMON_KEY not in state)
    if _COMMON_KEY in state:
        state = merge(state.pop(_COMMON_KEY), state)
    state = _listed(state, optimizer)
    parts = _parts(state, optimizer)
    recorded = None
    for part, inner in parts:
        _list_main_copies(part)
        told = part.pop(optimizer_settings.RECORD, None)
        recorded = recorded or told
        _check_same_kind(part, inner, told, name)
        _adopt_param_groups(part, inner, name, told, settings)
    _load(optimizer, state, parts, name)
    return recorded and recorded["config"]


def _check_same_kind(
    part: dict, inner: MegatronOptimizer, told: dict[str, Any] | None, name: str
) -> None:
    """Raise where a state cannot be this optimizer's.

    Raises:
        ValueError: another optimizer saved it, or it holds no tensors.
    """
    then, now = (told or {}).get("config", {}), optimizer_settings.described(inner.config)
    for field in ("optimizer", "use_distributed_optimizer"):
        if field in then and then[field] != now.get(field):
            raise ValueError(
                f"the optimizer state of module '{name}' was saved with {field}={then[field]!r}, "
                f"this run has {field}={now.get(field)!r}; set {field}={then[field]!r} in "
                "OptimizerConfig to go on from it"
            )
    if SHARDS in part:
        check_place(part[SHARDS], name)
    names = (told or {}).get(_PARAMETERS)
    if names and names != (mine := _names(inner)):
        pairs = zip_longest(chain(*names), chain(*mine))
        other = next((pair for pair in pairs if pair[0] != pair[1]), ("none", "none"))
        raise ValueError(
            f"the state of module '{name}' numbers other parameters: where it has {other[0]} this "
            f"run has {other[1]} (or in another group). MimoOptimizer.state_dict() fits a run that "
            "trains the same parameters in the same layout with the same groups; CheckpointStore "
            "fits others"
        )
    sharded = hasattr(inner, "get_parameter_state_dp_zero")
    if sharded and "param_state" not in part and SHARDS not in part:
        raise ValueError(
            f"the state of module '{name}' has no tensors of the distributed optimizer; load what "
            "MimoOptimizer.state_dict() returned, or use sharded_state_dict() or CheckpointStore"
        )


def _copied(value: Any, *, tensors: bool) -> Any:
    """A copy of dicts and lists, of ``tensors`` too if wanted."""
    if isinstance(value, dict):
        return {key: _copied(item, tensors=tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_copied(item, tensors=tensors) for item in value]
    return value.detach().clone() if tensors and isinstance(value, torch.Tensor) else value


def start_anew(optimizer: MegatronOptimizer) -> None:
    """Put a module's optimizer where it is before the first step, from the weights as they are."""
    for inner in inner_optimizers([optimizer]):
        inner.optimizer.state.clear()
        for group in inner.optimizer.param_groups:
            group.pop("step", None)  # where fused Adams count
    optimizer.reload_model_params()


def _list_main_copies(state: Any) -> None:
    """Make lists of what ``start_fresh`` made dicts of."""
    groups = state.get(MAIN_COPIES) if isinstance(state, dict) else None
    if isinstance(groups, dict):
        state[MAIN_COPIES] = [
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
    if not chained or isinstance(state, list):
        return state
    return [state[i] for i in sorted(state, key=int)]


def _give_first_state(optimizer: MegatronOptimizer) -> None:
    """Zero state for parameters that have none yet, as PyTorch's optimizers begin with.

    A run may be saved before its first step, or after skipped ones; and loading asks for what
    the optimizer has. Megatron's distributed optimizer reads the step count even to load into it.
    """
    for inner in inner_optimizers([optimizer]):
        stepping = getattr(inner, "optimizer", None)
        if isinstance(stepping, (torch.optim.Adam, torch.optim.AdamW)):
            make = _adam_state
        elif isinstance(stepping, torch.optim.SGD):
            make = _sgd_state
        else:
            if getattr(inner, "init_state_fn", None) and stepping is not None:
                inner.init_state_fn(stepping, inner.config)
            continue
        for group in stepping.param_groups:
            for param in group["params"]:
                if not stepping.state.get(param):
                    stepping.state[param] = make(group, param)


def _adam_state(_group: dict[str, Any], param: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "step": torch.zeros((), dtype=torch.float32),
        "exp_avg": torch.zeros_like(param),
        "exp_avg_sq": torch.zeros_like(param),
    }


def _sgd_state(group: dict[str, Any], param: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"momentum_buffer": torch.zeros_like(param)} if group["momentum"] else {}


def _load(
    optimizer: MegatronOptimizer,
    state: Any,
    parts: list[tuple[dict, Any]],
    name: str,
) -> None:
    """Load ``state``, tensors of the distributed optimizer in a step of their own.

    PyTorch's Adam keeps its step count among its tensors, where Megatron's loader looks for a
    saved tensor of every name and finds none for it; it is set aside meanwhile. It comes back as
    a copy per parameter: the loader shares one tensor, which Adam would then advance once for
    every parameter in each step.
    """
    shards = [(part.pop(SHARDS), inner) for part, inner in parts if SHARDS in part]
    tensors = [
        (part.pop("param_state"), inner)
        for part, inner in parts
        if part.get("param_state_sharding_type") == "fully_reshardable" and "param_state" in part
    ]
    with _known_groups(parts):
        optimizer.load_state_dict(state)
    for saved, inner in shards:
        load_shards(inner, saved, name)
    for param_state, inner in tensors:
        states = inner.optimizer.state.values()
        steps = [adam_state.pop("step", None) for adam_state in states]
        inner.load_parameter_state_from_fully_reshardable(param_state)
        for adam_state, step in zip(states, steps, strict=True):
            if step is not None:
                adam_state["step"] = step
    for inner in inner_optimizers([optimizer]):
        for adam_state in inner.optimizer.state.values() if inner.optimizer else ():
            if torch.is_tensor(adam_state.get("step")):
                adam_state["step"] = adam_state["step"].clone()


@contextlib.contextmanager
def _known_groups(parts: list[tuple[dict, MegatronOptimizer]]) -> Iterator[None]:
    """Inside, stock's loaders take the loaded groups one by one for this run's.

    They tell groups apart by some of their settings, which two groups may share, and which a run
    may change. What counts was settled before: see ``_adopt_param_groups``.
    """
    marked: list[tuple[Any, int, Any]] = []
    try:
        for part, inner in parts:
            loaded = part.get("optimizer", part).get("param_groups", [])
            for number, (mine, group) in enumerate(zip(inner.param_groups, loaded, strict=True)):
                mine.update({key: value for key, value in group.items() if key != "params"})
                marked.append((inner, number, group.get(_MARK, _ABSENT)))
                mine[_MARK] = group[_MARK] = number
        yield
    finally:
        # Also where loading fails: numbers of groups must not stay as factors of weight decay.
        _take_marks_off(marked)


def _take_marks_off(marked: list[tuple[Any, int, Any]]) -> None:
    for inner, number, value in marked:
        group = inner.param_groups[number]
        if value is _ABSENT:
            group.pop(_MARK, None)
        else:
            group[_MARK] = value


def _adopt_param_groups(
    part: dict, inner: MegatronOptimizer, name: str, told: dict[str, Any] | None, settings: str
) -> None:
    """Put this run's parameter groups, with the settings that count, in place of the loaded ones.

    Parameters are numbered by each run for itself. Where other parameters train than when the
    state was saved, one of this run's groups may be missing from it: its settings are this run's.

    Raises:
        ValueError: the saved settings are to count, and no group of this run is among them.
    """
    torch_state = part.get("optimizer", part)
    saved = torch_state.get("param_groups")
    if saved is None:
        return
    groups, common = optimizer_settings.merged_groups(inner, saved, told, settings)
    if groups and not common and settings == optimizer_settings.CHECKPOINT:
        raise ValueError(
            f"optimizer of module '{name}': the saved parameter groups have the multipliers "
            f"{optimizer_settings.multipliers(saved)}, those of this run "
            f"{optimizer_settings.multipliers(inner.param_groups)}; load with settings='run' to "
            "take this run's, or build the optimizer with the saved ones"
        )
    mine = inner.optimizer.state_dict()["param_groups"]
    torch_state["param_groups"] = [
        {**group, "params": own["params"]} for group, own in zip(groups, mine, strict=True)
    ]
