# SPDX-License-Identifier: Apache-2.0
"""A ``DeviceMesh`` over the ranks and process groups that a grid has already."""

from __future__ import annotations

import weakref

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

from megatron.core.hyper_comm_grid import GridShape, HyperCommGrid, box_of

FSDP, TP = "fsdp", "tp"
_KEPT = "torch_native_mesh"
_made: dict[str, list[weakref.ref[dist.ProcessGroup]]] = {}
"""Ranks of meshes, and of each of their dims -> their groups."""


def mesh_of(grid: HyperCommGrid, device_type: str | None = None) -> DeviceMesh:
    """Return the mesh ("fsdp", "tp") of a grid's ``dp`` and ``tp``: the same ranks and groups.

    With ``cp`` above 1 "fsdp" is ``cp`` times ``dp``: ranks of both have the same weights, and
    gradients are the sum over both.

    A group that the grid lacks is made and kept in it, by all ranks of the world; none is made
    twice. To PyTorch two meshes over the same ranks are one, and what it remembers of the first it
    uses for the second: destroy such grids together, or before the next one's mesh is made.

    Args:
        grid: with dims ``tp`` and ``dp``, maybe ``cp``; any other has size 1.
        device_type: of the tensors; None is what the groups' backend moves, an accelerator
            first.

    Raises:
        ValueError: a dim is missing or is one that torch-native modules cannot split by.
    """
    problem = grid_problem(grid)
    if problem:
        raise ValueError(problem)
    box = box_of(grid)
    groups = [grid.get_or_create_pg(_data_dims(box)), grid.get_or_create_pg("tp")]
    table = rank_table(box)
    _forget_equal_meshes(table, groups)
    return DeviceMesh.from_group(
        groups,
        device_type or _device_type(groups[1]),
        table,
        mesh_dim_names=(FSDP, TP),
    )


def mesh_in(model: nn.Module) -> DeviceMesh:
    """Return the mesh that a model was sharded over.

    Raises:
        ValueError: it is not sharded.
    """
    mesh = getattr(model, _KEPT, None)
    if mesh is None:
        raise ValueError(
            f"this {type(model).__name__} is not sharded; give the model that parallelize "
            "returned, not a part of it"
        )
    return mesh


def keep_mesh(model: nn.Module, mesh: DeviceMesh) -> None:
    """Remember the mesh for :func:`mesh_in`."""
    setattr(model, _KEPT, mesh)


def rank_table(box: GridShape) -> torch.Tensor:
    """Return the ranks as a table ``(cp * dp, tp)``; a column's order is its group's."""
    return torch.tensor(box.enumerate_groups(_data_dims(box))).T


def _data_dims(box: GridShape) -> list[str]:
    """The dims over whose ranks gradients are added up, slowest first."""
    wanted = {"dp", "cp"} if box.dim_size("cp") > 1 else {"dp"}
    return [name for name in reversed(box.dim_names) if name in wanted]


def grid_problem(grid: HyperCommGrid) -> str:
    """Return why a torch-native module cannot lie on a grid; empty if it can."""
    missing = [name for name in ("tp", "dp") if name not in grid.dim_names]
    if missing:
        return (
            f"a torch-native module needs a grid with dims 'tp' and 'dp', got {grid.dim_names} "
            f"without {missing}; name them, of size 1 if need be"
        )
    sizes = dict(zip(grid.dim_names, grid.shape, strict=True))
    if sizes.get("pp", 1) > 1:
        return (
            f"a torch-native module has no pipeline stages, got pp={sizes['pp']}; give those ranks "
            "to dp (FSDP shards the weights over them) or take Megatron's layers"
        )
    others = {name: n for name, n in sizes.items() if name not in ("tp", "cp", "dp") and n > 1}
    if others:
        return (
            f"a torch-native module is split by tp, cp and dp only, got {others}; give those ranks "
            "to them, or take Megatron's layers"
        )
    return ""


def _forget_equal_meshes(table: torch.Tensor, groups: list[dist.ProcessGroup]) -> None:
    """Clear what PyTorch remembers of operations on tensors, if it is of other groups.

    It takes meshes of the same ranks for one another, and a tensor would get the mesh, and with it
    the groups, of a grid that may be gone. Each dim is a mesh of its own, too.
    """
    made = {str(table.tolist()): groups}
    for dim, group in zip((FSDP, TP), groups, strict=True):
        made[f"{dim} {dist.get_process_group_ranks(group)}"] = [group]
    if any(_groups_of(ranks) not in ([], found) for ranks, found in made.items()):
        _clear_sharding_prop_cache()
    _made.update({ranks: [weakref.ref(group) for group in found] for ranks, found in made.items()})


def _groups_of(ranks: str) -> list[dist.ProcessGroup | None]:
    """The groups of the latest mesh of these ranks; None for one that is gone."""
    return [reference() for reference in _made.get(ranks, [])]


def _device_type(group: dist.ProcessGroup) -> str:
    types = [device.type for device in group._device_types]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    first = torch.get_default_device() if accelerator is None else accelerator
    return first.type if first.type in types else types[0]
