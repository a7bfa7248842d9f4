# SPDX-License-Identifier: Apache-2.0
"""A model ready to train: its weights drawn, its modules wrapped, and what its steps need."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.models.mimo.gradients.finalize import (
    MimoGradFinalizer,
    iter_modules,
    wrap_modules_with_ddp,
)
from megatron.core.models.mimo.model.base import MimoModel
from megatron.core.models.mimo.randomness import ModuleRandomness
from megatron.core.models.mimo.training.initial_weights import initialize_weights
from megatron.core.models.mimo.training.parameter_names import Named, named_parameters
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

LANGUAGE = "language"
"""Name of the language model among the modules."""


@dataclass
class BuiltModel:
    """The built model and what training it needs.

    Attributes:
        model: the MimoModel, its modules wrapped in DistributedDataParallel.
        grids, collections, configs: by module name.
        finalize: the schedule's ``finalize_model_grads_func``.
        randomness: the modules' random states.
        packed: the language model takes packed sequences.
    """

    model: MimoModel
    grids: dict[str, HyperCommGrid]
    collections: dict[str, ProcessGroupCollection]
    configs: dict[str, TransformerConfig]
    finalize: MimoGradFinalizer
    randomness: ModuleRandomness
    packed: bool

    def destroy(self) -> None:
        """Release all process groups; the model cannot be used afterwards."""
        self.model.destroy()
        for grid in self.grids.values():
            grid.destroy()

    def named_parameters(self) -> list[Named]:
        """Return this rank's parameters with their names."""
        return named_parameters(iter_modules(self.model))

    def layouts(self) -> dict[str, dict[str, int]]:
        """Return module name -> sizes of its axes, for checkpoints and summaries."""
        sizes = {
            name: {dim: grid.dim_size(dim) for dim in ("tp", "cp", "pp", "dp")}
            for name, grid in self.grids.items()
        }
        groups = self.collections[LANGUAGE]
        if self.configs[LANGUAGE].num_moe_experts:
            sizes[LANGUAGE] |= {"ep": groups.ep.size(), "etp": groups.expt_tp.size()}
        return sizes


def finish_model(
    model: MimoModel,
    grids: dict[str, HyperCommGrid],
    collections: dict[str, ProcessGroupCollection],
    configs: dict[str, TransformerConfig],
    ddp_config: DistributedDataParallelConfig,
    *,
    seed: int,
    freeze: Callable[[MimoModel], None],
) -> BuiltModel:
    """Draw the weights, freeze, and wrap the modules; every rank calls it together.

    Initial weights depend on the seed and on parameter names, never on the layouts.

    Args:
        model: just built, on the CPU or on this rank's device.
        grids, collections, configs: by module name.
        ddp_config: of every module.
        seed: of weights and random states.
        freeze: stops the training of parts, before DDP makes gradient buffers of what trains.
    """
    if torch.cuda.is_available():
        model.to(torch.device(torch.cuda.current_device()))
    for name, module in iter_modules(model):
        tp_group = collections[name].tp
        initialize_weights(module, seed, name_prefix=f"{name}.", tp_group=tp_group)
    freeze(model)
    randomness = ModuleRandomness(iter_modules(model), collections, seed)
    wrap_modules_with_ddp(model, configs, ddp_config, collections)
    finalize = MimoGradFinalizer(collections)
    packed = model.mimo_config.kv_format == "thd"
    return BuiltModel(model, grids, collections, configs, finalize, randomness, packed)


def freeze_parts(model: MimoModel, parts: Iterable[str], sides: Mapping[str, str]) -> None:
    """Stop the training of parts, as :class:`mimo_colocated.launch.freezing.Freezable` names them.

    Args:
        model: before DDP wraps its modules, which makes gradient buffers of what trains.
        parts: their names.
        sides: modality -> its encoder's name on the command line. Encoders tell their lower half
            by a method ``lower_half()``, if a part asks for it.
    """
    known: dict[str, list[Any]] = defaultdict(list)
    known[LANGUAGE] = [module for name, module in iter_modules(model) if name == LANGUAGE]
    submodules: Any = model.modality_submodules
    for name, submodule in submodules.items():
        encoders = list(submodule.encoders.values())
        known["lower-encoder"] += [p for e in encoders for p in getattr(e, "lower_half", list)()]
        for prefix in ("", f"{sides[name]}-"):
            known[f"{prefix}encoder"] += encoders
            known[f"{prefix}projector"] += submodule.input_projections
    for part in parts:
        for module in known[part]:
            module.requires_grad_(False)
