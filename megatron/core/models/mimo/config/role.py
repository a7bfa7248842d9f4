# SPDX-License-Identifier: Apache-2.0
"""Which modules a rank runs, and at which pipeline stage of each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum

import torch.distributed as dist

from megatron.core.hyper_comm_grid import HyperCommGrid

# A model has exactly one language model, so its key is fixed.
MIMO_LANGUAGE_MODULE_KEY = "language"


class ModuleLayout(Enum):
    """How the modules lie on the ranks."""

    COLOCATED = "colocated"
    """All modules on the same ranks, each with its own factorisation of them."""

    NON_COLOCATED = "non_colocated"
    """Encoders and language model on disjoint ranks: a rank runs one side only."""


@dataclass
class ModuleStageInfo:
    """Where in one module's pipeline a rank stands.

    Attributes:
        is_first_stage: the rank holds the module's first pipeline stage.
        is_last_stage: the rank holds its last one.
    """

    is_first_stage: bool
    is_last_stage: bool


@dataclass
class RankRole:
    """The modules that this rank runs.

    Attributes:
        modules: module name -> stage, for the modules of this rank only.
        mode: the layout, which decides how ``MimoModel.forward`` dispatches.
    """

    modules: dict[str, ModuleStageInfo] = field(default_factory=dict)
    mode: ModuleLayout = ModuleLayout.COLOCATED

    @classmethod
    def build(
        cls,
        modality_module_names: Iterable[str],
        module_to_grid_map: Mapping[str, HyperCommGrid] | None = None,
    ) -> RankRole:
        """Return the role of the calling rank.

        Without a grid map, or when all grids cover the same ranks, every module runs here.

        Raises:
            ValueError: an encoder grid shares some but not all ranks with the language grid.
            RuntimeError: the rank is in no grid.
        """
        if module_to_grid_map is None or cls._all_grids_colocated(module_to_grid_map):
            return cls._colocated(modality_module_names, module_to_grid_map)
        return cls._from_grid_map(module_to_grid_map)

    @staticmethod
    def _all_grids_colocated(module_to_grid_map: Mapping[str, HyperCommGrid]) -> bool:
        spans = {(grid.rank_offset, grid.size) for grid in module_to_grid_map.values()}
        return len(spans) <= 1

    @classmethod
    def _colocated(
        cls,
        modality_module_names: Iterable[str],
        module_to_grid_map: Mapping[str, HyperCommGrid] | None = None,
    ) -> RankRole:
        module_to_grid_map = module_to_grid_map or {}
        names = [*modality_module_names, MIMO_LANGUAGE_MODULE_KEY]
        stages = {name: _colocated_stage(module_to_grid_map.get(name)) for name in names}
        return cls(modules=stages, mode=ModuleLayout.COLOCATED)

    @classmethod
    def _from_grid_map(cls, module_to_grid_map: Mapping[str, HyperCommGrid]) -> RankRole:
        _refuse_partial_overlap(module_to_grid_map)
        rank = dist.get_rank()
        modules = {
            name: _stage_in(grid)
            for name, grid in module_to_grid_map.items()
            if rank in _span(grid)
        }
        if not modules:
            spans = {name: _words(grid) for name, grid in module_to_grid_map.items()}
            raise RuntimeError(
                f"Rank {rank} is not in any module grid; the grids cover {spans}. Give every rank "
                "of the job a module in module_to_grid_map."
            )
        return cls(modules=modules, mode=ModuleLayout.NON_COLOCATED)

    @property
    def has_modality_modules(self) -> bool:
        """Whether this rank runs an encoder."""
        return bool(self.modality_module_names)

    @property
    def has_language_module(self) -> bool:
        """Whether this rank runs (a stage of) the language model."""
        return MIMO_LANGUAGE_MODULE_KEY in self.modules

    @property
    def modality_module_names(self) -> list[str]:
        """The modalities that this rank runs, in the order of the grid map."""
        return [name for name in self.modules if name != MIMO_LANGUAGE_MODULE_KEY]

    def is_first_stage(self, module_name: str) -> bool:
        """Return whether this rank runs the first stage of a module."""
        stage = self.modules.get(module_name)
        return stage is not None and stage.is_first_stage

    def is_last_stage(self, module_name: str) -> bool:
        """Return whether this rank runs the last stage of a module."""
        stage = self.modules.get(module_name)
        return stage is not None and stage.is_last_stage


def _span(grid: HyperCommGrid) -> range:
    return range(grid.rank_offset, grid.rank_offset + grid.size)


def _words(grid: HyperCommGrid) -> str:
    return f"{grid.rank_offset}..{grid.rank_offset + grid.size - 1}"


def _stage_in(grid: HyperCommGrid) -> ModuleStageInfo:
    """This rank's pipeline stage in a grid; a grid without ``pp`` has one stage."""
    if "pp" not in grid.dim_names:
        return ModuleStageInfo(is_first_stage=True, is_last_stage=True)
    group = grid.get_pg("pp")
    stage, stages = group.rank(), group.size()
    return ModuleStageInfo(is_first_stage=stage == 0, is_last_stage=stage == stages - 1)


def _colocated_stage(grid: HyperCommGrid | None) -> ModuleStageInfo:
    """This rank's stage where all modules share their ranks; no process group is asked."""
    stages = 1
    if grid is not None and "pp" in grid.dim_names:
        stages = grid.shape[list(grid.dim_names).index("pp")]
    if grid is None or stages == 1 or dist.get_rank() not in _span(grid):
        return ModuleStageInfo(is_first_stage=True, is_last_stage=True)
    stage = grid.coords(dist.get_rank())["pp"]
    return ModuleStageInfo(is_first_stage=stage == 0, is_last_stage=stage == stages - 1)


def _refuse_partial_overlap(module_to_grid_map: Mapping[str, HyperCommGrid]) -> None:
    """A rank runs encoders or the language model, never both, unless all modules are colocated."""
    language = module_to_grid_map.get(MIMO_LANGUAGE_MODULE_KEY)
    if language is None:
        return
    for name, grid in module_to_grid_map.items():
        shared = set(_span(grid)) & set(_span(language))
        if grid is not language and shared:
            raise ValueError(
                f"The '{name}' grid (ranks {_words(grid)}) shares {len(shared)} ranks with the "
                f"'{MIMO_LANGUAGE_MODULE_KEY}' grid (ranks {_words(language)}). Put all modules "
                "on the same ranks (colocated), or the encoders on ranks of their own."
            )
