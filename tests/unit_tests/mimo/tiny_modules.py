# SPDX-License-Identifier: Apache-2.0
"""Modules of two weights in any layout, on the same or on different ranks, for 8-rank tests.

``sharded`` is cut over TP along its first dim, ``whole`` is a copy on every rank. Weights and
gradients are functions of (module, step), so what the whole model has is known on every rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.distributed as dist

from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.models.mimo.gradients.finalize import (
    iter_modules,
    wrap_modules_with_ddp,
)
from megatron.core.models.mimo.training.groups import create_process_groups, make_grid
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from tests.harness.backend import own_device

ROWS, WIDTH = 8, 6
COLOCATED = {"images": {"tp": 2, "dp": 4}, "language": {"tp": 2, "cp": 2, "dp": 2}}
DISJOINT = {
    "images": {"tp": 2, "dp": 2},
    "language": {"tp": 2, "cp": 2, "dp": 1, "rank_offset": 4},
}


def config(**overrides: object) -> TransformerConfig:
    """The smallest one that sums gradients."""
    settings = {"num_layers": 1, "hidden_size": WIDTH, "num_attention_heads": 1}
    return TransformerConfig(**{**settings, "calculate_per_token_loss": True, **overrides})


class TinyModule(MegatronModule):
    """Two weights and no forward."""

    def __init__(self, name: str, groups: ProcessGroupCollection, dtype: torch.dtype) -> None:
        super().__init__(config=config())
        parts = {key: own(name, key, value, groups) for key, value in values(name, 0).items()}
        self.sharded = torch.nn.Parameter(parts["sharded"].to(dtype))
        self.whole = torch.nn.Parameter(parts["whole"].to(dtype))
        self.sharded.tensor_model_parallel = True
        self.sharded.partition_dim = 0
        self.sharded.partition_stride = 1


def values(name: str, step: int) -> dict[str, torch.Tensor]:
    """Weights (step 0) or gradients (step > 0) of a whole module, by parameter."""
    generator = torch.Generator().manual_seed(1000 * step + sum(map(ord, name)))
    return {
        "sharded": torch.randn(ROWS, WIDTH, generator=generator).to(own_device()),
        "whole": torch.randn(WIDTH, generator=generator).to(own_device()),
    }


def own(_name: str, key: str, value: torch.Tensor, groups: ProcessGroupCollection) -> torch.Tensor:
    """This TP rank's part."""
    if key != "sharded":
        return value.clone()
    return value.chunk(groups.tp.size())[groups.tp.rank()].clone()


@dataclass
class TinyModel:
    """What ``get_mimo_optimizer`` and the finalizer ask of a MimoModel."""

    mimo_config: SimpleNamespace
    language_model: torch.nn.Module | None
    modality_submodules: dict[str, torch.nn.Module | None]
    grids: dict[str, HyperCommGrid]
    collections: dict[str, ProcessGroupCollection]

    def named(self) -> Iterator[tuple[str, str, torch.nn.Parameter]]:
        """(module, parameter's own name, parameter) of this rank."""
        for name, module in iter_modules(self):
            for key, parameter in module.named_parameters():
                yield name, key.rpartition(".")[2], parameter

    def set_gradients(self, gradients: dict[str, dict[str, torch.Tensor]]) -> None:
        """Give every rank its part of the whole model's gradients."""
        for name, key, parameter in self.named():
            if parameter.requires_grad:
                part = own(name, key, gradients[name][key], self.collections[name])
                parameter.main_grad.copy_(part)

    def weights(self) -> dict[str, torch.Tensor]:
        """Copies of this rank's weights."""
        return {f"{name}.{key}": p.detach().clone() for name, key, p in self.named()}


@contextlib.contextmanager
def tiny_model(
    layouts: dict[str, dict[str, int]],
    *,
    distributed: bool = False,
    frozen: tuple[str, ...] = (),
    dtype: torch.dtype = torch.float32,
    wrap: bool = True,
) -> Iterator[TinyModel]:
    """A model of one tiny module per layout; its groups are gone afterwards."""
    grids = {name: make_grid(**sizes) for name, sizes in layouts.items()}
    collections = {name: create_process_groups(grid) for name, grid in grids.items()}
    modules = {
        name: TinyModule(name, collections[name], dtype) if grid.is_current_rank_in_grid() else None
        for name, grid in grids.items()
    }
    model = TinyModel(
        SimpleNamespace(module_to_grid_map=grids),
        modules["language"],
        {name: module for name, module in modules.items() if name != "language"},
        grids,
        collections,
    )
    for name in frozen:
        if modules[name] is not None:
            modules[name].requires_grad_(False)
    if wrap:
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=distributed
        )
        wrap_modules_with_ddp(model, {name: config() for name in grids}, ddp_config, collections)
    try:
        yield model
    finally:
        dist.barrier()
        for grid in grids.values():
            grid.destroy()


def on_all_ranks(value: object) -> list:
    """Every rank's value, in rank order."""
    found: list = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found
