# SPDX-License-Identifier: Apache-2.0
"""The language model's CP and TP groups: from the caller, else from the language grid."""

from __future__ import annotations

from typing import Any

from torch.distributed import ProcessGroup

from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.models.mimo.config.base_configs import MimoModelConfig
from megatron.core.models.mimo.config.role import MIMO_LANGUAGE_MODULE_KEY
from megatron.core.models.mimo.partition.utils import PartitionAdapter, PartitionConfig

_DEFAULT_MAX_SEQ_LEN = 4096


def partition_adapter(
    options: MimoModelConfig,
    colocated: bool,
    cp_group: ProcessGroup | None,
    tp_group: ProcessGroup | None,
) -> PartitionAdapter | None:
    """Return the adapter of a language rank, with the groups of the language grid.

    Args:
        options: of the model.
        colocated: whether all modules are on the same ranks.
        cp_group, tp_group: the caller's; ``None`` for the grid's.

    Returns:
        ``None`` without CP and SP.

    Raises:
        ValueError: sizes of config, grid and groups that disagree.
        KeyError: a group is needed and was not created.
    """
    params = options.language_model_spec.params
    config = params["config"]
    grid = (options.module_to_grid_map or {}).get(MIMO_LANGUAGE_MODULE_KEY)
    needs_cp, needs_sp = config.context_parallel_size > 1, config.sequence_parallel
    check_cp_size(grid, cp_group, config.context_parallel_size)
    if colocated:
        check_pp_size(grid, getattr(config, "pipeline_model_parallel_size", None))
    cp_group = language_group(grid, "cp", cp_group, needs_cp)
    tp_group = language_group(grid, "tp", tp_group, needs_sp)
    if not needs_cp and not needs_sp:
        return None
    return PartitionAdapter(
        PartitionConfig.from_mp_config(
            mp=config,
            max_seq_len=params.get("max_sequence_length", _DEFAULT_MAX_SEQ_LEN),
            kv_format=options.kv_format,
            cp_group=cp_group,
            tp_group=tp_group,
        )
    )


def check_cp_size(
    grid: HyperCommGrid | None, cp_group: ProcessGroup | None, config_size: int
) -> None:
    """Check that config, grid and a given group have one CP size.

    Where they differ the sequence would be cut one way and the gradients summed another.

    Raises:
        ValueError: two of them differ.
    """
    grid_size, group_size = _grid_size(grid, "cp"), _group_size(cp_group)
    if known_size(config_size) is None:
        return
    if grid_size not in (None, config_size):
        raise ValueError(
            f"The language grid has cp size {grid_size}, the language config has "
            f"context_parallel_size {config_size}; they must be equal, change one of them"
        )
    if group_size not in (None, config_size):
        raise ValueError(
            f"cp_group has {group_size} ranks, the language config has context_parallel_size "
            f"{config_size}; they must be equal, pass the group that the config describes"
        )


def check_pp_size(grid: HyperCommGrid | None, config_size: int | None) -> None:
    """Check that config and grid have one number of pipeline stages.

    Raises:
        ValueError: they differ.
    """
    grid_size = _grid_size(grid, "pp") or 1
    if grid is not None and known_size(config_size) not in (None, grid_size):
        raise ValueError(
            f"The language grid has pp size {grid_size}, the language config has "
            f"pipeline_model_parallel_size {config_size}; they must be equal, change one of them"
        )


def language_group(
    grid: HyperCommGrid | None, dim: str, given: ProcessGroup | None, needed: bool
) -> ProcessGroup | None:
    """Return the group of one dim of the language model.

    Args:
        grid: the language grid, if there is one.
        dim: ``"cp"`` or ``"tp"``.
        given: the caller's group; it is used as it is.
        needed: whether the model uses the group at all.

    Returns:
        ``given``, else the grid's group if it is needed and the dim is larger than 1, else
        ``None``.

    Raises:
        ValueError: ``given`` is not as large as the grid's dim.
        KeyError: the grid's group is needed and has not been created.
    """
    grid_size = _grid_size(grid, dim)
    if given is not None:
        given_size = _group_size(given)
        if None not in (grid_size, given_size) and grid_size != given_size:
            raise ValueError(
                f"{dim}_group has {given_size} ranks, but the language grid has {dim} size "
                f"{grid_size}; pass the grid's own group or leave {dim}_group out"
            )
        return given
    if grid is None or not needed or grid_size in (None, 1):
        return None
    try:
        return grid.get_pg(dim)
    except KeyError as error:
        raise KeyError(
            f"MimoModel needs the language grid's '{dim}' group and it was not created; call "
            f"grid.create_pg('{dim}') on every rank first, or pass {dim}_group"
        ) from error


def _grid_size(grid: HyperCommGrid | None, dim: str) -> int | None:
    """Size of a dim that the grid names; ``None`` where it does not say."""
    if grid is None or dim not in grid.dim_names:
        return None
    return known_size(grid.shape[list(grid.dim_names).index(dim)])


def _group_size(group: Any) -> int | None:
    """Ranks of a group; ``None`` for a stand-in without a size."""
    size = getattr(group, "size", None)
    return known_size(size()) if callable(size) else None


def known_size(value: Any) -> int | None:
    """Return a size; ``None`` where a stand-in for a config or a group does not say one."""
    return value if isinstance(value, int) else None
