# SPDX-License-Identifier: Apache-2.0
"""Make the parts of a ``MimoModel`` from its configuration: bridges and modalities."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import nn

from megatron.core.models.mimo.config.base_configs import MimoModelConfig, bridge_of, option_of
from megatron.core.models.mimo.config.role import MIMO_LANGUAGE_MODULE_KEY, ModuleStageInfo
from megatron.core.models.mimo.model.paths import path_named
from megatron.core.models.mimo.model.replicated_encoders import warn_of_replicated_encoders
from megatron.core.models.mimo.submodules.base import ModalitySubmodules
from megatron.core.models.mimo.transformer.input_gradients import sum_wanted_gradients_only
from megatron.core.transformer.spec_utils import ModuleSpec

if TYPE_CHECKING:
    from megatron.core.models.mimo.model.base import MimoModel


def make_bridges(model: MimoModel) -> Iterator[tuple[tuple[str, str], Any]]:
    """Make one bridge per modality; grids without ``tp`` or ``dp`` say nothing and get none.

    Args:
        model: whose configurations say which.

    Yields:
        ``(modality, "language")`` and its bridge.
    """
    mimo_config = model.mimo_config
    grid_map = mimo_config.module_to_grid_map or {}
    if any(not {"tp", "dp"} <= set(grid.dim_names) for grid in grid_map.values()):
        return
    # The spec's order, the same on all ranks: bridges create process groups.
    for name in mimo_config.modality_submodules_spec:
        path = path_named(bridge_of(mimo_config, name))
        yield (name, MIMO_LANGUAGE_MODULE_KEY), path.make_bridge(
            model.config,
            mimo_config,
            src_grid=grid_map[name],
            dest_grid=grid_map[MIMO_LANGUAGE_MODULE_KEY],
            src_module_name=name,
            dest_module_name=MIMO_LANGUAGE_MODULE_KEY,
        )


def build_modality(
    name: str, spec: ModuleSpec, stage: ModuleStageInfo, mimo_config: MimoModelConfig
) -> Any:
    """Build a modality of this rank.

    Args:
        name, spec: of the modality.
        stage: the rank's, of the modality.
        mimo_config: of the model.
    """
    kind: Any = spec.module
    built = kind.from_spec(
        spec, is_first_stage=stage.is_first_stage, is_last_stage=stage.is_last_stage
    )
    memory = option_of(mimo_config, "encoder_memory")
    if name in memory:
        built.use_memory(memory[name])
    if isinstance(built, nn.Module):
        sum_wanted_gradients_only(built)
        grids = getattr(mimo_config, "module_to_grid_map", None) or {}
        warn_of_replicated_encoders(name, built, grids.get(name))
        _cut_items(name, built, grids.get(name))
    return built


def _cut_items(name: str, built: nn.Module, grid: Any) -> None:
    """With CP in an encoder's grid each of its ranks has a part of every item."""
    sizes = {} if grid is None else dict(zip(grid.dim_names, grid.shape, strict=False))
    if grid is None or sizes.get("cp", 1) == 1:
        return
    try:
        if not isinstance(built, ModalitySubmodules):
            raise ValueError(f"{type(built).__name__} is no ModalitySubmodules, which cuts items")
        built.cut_items(grid.coords(dist.get_rank())["cp"], sizes["cp"])
    except ValueError as error:
        raise ValueError(f"Modality '{name}': {error}") from None
