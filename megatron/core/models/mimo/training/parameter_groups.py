# SPDX-License-Identifier: Apache-2.0
"""Other learning rates and weight decay for some parameters: stock's optimizer groups, by name.

Megatron-Core's optimizer takes other settings for parameters that a predicate knows; its schedule
reads peak, last rate and decay from each group. So every group warms up and decays in the steps of
the run, between rates of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron.core.models.mimo.training.agreement import gathered
from megatron.core.models.mimo.training.parameter_names import (
    Named,
    ParameterNameError,
    select,
)
from megatron.core.models.mimo.wrappers import is_torch_native, stepped
from megatron.core.optimizer import OptimizerConfig, get_standard_config_overrides
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from mimo_colocated.launch.parameter_groups import ParameterGroup

GROUP = "mimo_group"
"""What a group of these is called among the settings of an optimizer's groups: its number."""


def config_overrides(
    groups: Sequence[ParameterGroup],
    named: Sequence[Named],
    modules: Iterable[Any],
    config: OptimizerConfig,
) -> Mapping[ParamKey, Any] | None:
    """Return the groups as Megatron-Core's optimizer takes them; None if there are none.

    All ranks call it together. Of several groups that name a parameter the last one counts.

    Args:
        groups: other settings.
        named: this rank's parameters.
        modules: that the optimizers step, wrapped.
        config: of the optimizers.

    Raises:
        ParameterNameError: the same on all ranks: a group is wrong in itself, or no parameter
            that trains has its settings.
    """
    if not groups:
        return None
    chosen: dict[int, int] = {}
    for number, group in enumerate(groups):
        if problem := group.problem(config.lr or 0.0, config.min_lr or 0.0):
            raise ParameterNameError(f"groups.{number}: {problem}")
        for own in select(group.parameters, named, f"groups.{number}: "):
            chosen |= dict.fromkeys(own, number)
    _check_all_count(groups, named, chosen)
    for module in filter(is_torch_native, modules):
        for _name, parameter, plain in stepped(module).pairs():
            if id(parameter) in chosen:
                chosen[id(plain)] = chosen[id(parameter)]
    overrides: dict[ParamKey, Any] = dict(get_standard_config_overrides(config))
    for number, group in enumerate(groups):
        key = ParamKey(with_name_predicate=_predicate(number, chosen))
        overrides[key] = {**_settings(group, config), GROUP: number}
    return overrides


def _predicate(number: int, chosen: Mapping[int, int]) -> ParamWithNamePredicate:
    return ParamWithNamePredicate(
        f"groups.{number}", lambda weight, _name: chosen.get(id(weight)) == number
    )


def _settings(group: ParameterGroup, config: OptimizerConfig) -> dict[str, float]:
    """A group as stock's optimizer and schedule read it."""
    found = {}
    if group.lr is not None or group.min_lr is not None:
        found["max_lr"], found["min_lr"] = group.rates(config.lr or 0.0, config.min_lr or 0.0)
    if group.weight_decay is not None:
        found["start_wd"] = found["end_wd"] = group.weight_decay
    return found


def _check_all_count(
    groups: Sequence[ParameterGroup],
    named: Sequence[Named],
    chosen: Mapping[int, int],
) -> None:
    used = {chosen.get(id(each.parameter)) for each in named if each.parameter.requires_grad}
    everywhere = set().union(*gathered(used))
    for number, group in enumerate(groups):
        if number not in everywhere:
            raise ParameterNameError(
                f"groups.{number}: no parameter that {group.parameters} names has its settings; "
                "all are frozen, or named again by a later group"
            )


def learning_rates(name: str, groups: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return the learning rates of a module: its own, and ``NAME.groups.0`` of others.

    One that is alone has the module's name.

    Args:
        name: of the module.
        groups: of its optimizer.
    """
    rates: dict[int | None, float] = {}
    for group in groups:
        rates.setdefault(group.get(GROUP), float(group["lr"]))
    if len(rates) == 1:
        return dict.fromkeys([name], *rates.values())
    return {
        name if number is None else f"{name}.groups.{number}": rate
        for number, rate in rates.items()
    }
