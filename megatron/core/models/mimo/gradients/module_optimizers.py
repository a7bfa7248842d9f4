# SPDX-License-Identifier: Apache-2.0
"""The stock optimizers of a model's modules: checked on all ranks, then built over their groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron.core.models.mimo.config.role import MIMO_LANGUAGE_MODULE_KEY
from megatron.core.models.mimo.gradients.finalize import iter_modules
from megatron.core.models.mimo.model.rank_modules import stages_of
from megatron.core.models.mimo.training.agreement import gathered
from megatron.core.models.mimo.training.inner_optimizers import (
    attend_construction,
    build_inner_optimizer,
    count_over_fsdp,
    own_config,
)
from megatron.core.models.mimo.training.optimizer_checks import (
    check_fields_are_used,
    check_optimizer,
    problem_of_dtypes,
)
from megatron.core.models.mimo.training.parameter_groups import config_overrides
from megatron.core.models.mimo.training.parameter_names import Named, named_parameters
from megatron.core.models.mimo.wrappers import stepped
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from mimo_colocated.launch.parameter_groups import ParameterGroup

if TYPE_CHECKING:
    from megatron.core.hyper_comm_grid import HyperCommGrid
    from megatron.core.models.mimo.model.base import MimoModel

GroupsOf = Callable[["HyperCommGrid"], ProcessGroupCollection]


@dataclass
class ModuleOptimizerInfo:
    """The optimizer of one module on this rank.

    Attributes:
        optimizer: the module's stock optimizer, ``None`` where the rank does not hold the module
            or nothing in it is trained.
        grid: the module's grid.
        pg_collection: the groups the optimizer was made with.
        is_active: whether this rank is in the module's grid.
        modules: the module's parts on this rank, to name parameters; several for virtual stages.
    """

    optimizer: MegatronOptimizer | None
    grid: HyperCommGrid | None
    pg_collection: ProcessGroupCollection | None
    is_active: bool
    modules: tuple[Any, ...] = ()


def build_module_optimizers(
    mimo_model: MimoModel,
    config: OptimizerConfig,
    groups_of: GroupsOf,
    groups: Sequence[ParameterGroup],
    named: Sequence[Named] | None,
) -> dict[str, ModuleOptimizerInfo]:
    """Build one inner optimizer per module; the arguments and errors of ``get_mimo_optimizer``.

    Args:
        mimo_model: modules already wrapped in DistributedDataParallel.
        config: configuration of all inner optimizers.
        groups_of: makes a grid's groups on first use.
        groups: other learning rates and weight decay for some parameters.
        named: this rank's parameters, where groups use other names than the model's own.
    """
    check_optimizer(config)
    grids = mimo_model.mimo_config.module_to_grid_map
    if not grids:
        raise ValueError(
            "get_mimo_optimizer needs module_to_grid_map in MimoModelConfig: "
            "give one HyperCommGrid per modality and one for 'language'"
        )
    _check_dtypes(mimo_model, config)
    modules = list(iter_modules(mimo_model))
    named = named_parameters(modules) if named is None else named
    overrides = config_overrides(groups, named, (module for _, module in modules), config)
    return {
        name: _module_info(mimo_model, name, grid, config, groups_of, overrides)
        for name, grid in grids.items()
    }


def _check_dtypes(mimo_model: MimoModel, config: OptimizerConfig) -> None:
    """Raise the first rank's problem on every rank.

    Raises:
        ValueError: a parameter's dtype does not fit ``config``.
    """
    told = gathered(problem_of_dtypes(iter_modules(mimo_model), config))
    problem = next((each for each, _ in told if each), None)
    if problem:
        raise ValueError(problem)
    check_fields_are_used(set().union(*(used for _, used in told)), config)


def _module_info(
    mimo_model: MimoModel,
    name: str,
    grid: HyperCommGrid,
    config: OptimizerConfig,
    groups_of: GroupsOf,
    overrides: Mapping[Any, Any] | None,
) -> ModuleOptimizerInfo:
    active = grid.is_current_rank_in_grid()
    if name == MIMO_LANGUAGE_MODULE_KEY:
        modules = stages_of(mimo_model)
    else:
        modules = [mimo_model.modality_submodules[name]] if active else []
    # Also on ranks outside the grid: making a group takes every rank of the world.
    collection = groups_of(grid)
    present = active and bool(modules)
    trained = present and any(p.requires_grad for m in modules for p in m.parameters())
    trained_on = gathered(trained)
    optimizer = None
    if trained:
        plain = [stepped(module) for module in modules]
        own = own_config(config, modules)
        optimizer = build_inner_optimizer(name, plain, own, collection, overrides)
        count_over_fsdp(optimizer, modules, collection)
    elif any(trained_on):
        attend_construction(config)
    groups = collection if present else None
    return ModuleOptimizerInfo(optimizer, grid, groups, active, tuple(modules if present else ()))
