# SPDX-License-Identifier: Apache-2.0
"""Stock's optimizers of one module: built together on all ranks, and what is asked of each.

A module's optimizer may be a chain: with experts, one for their parameters and one for the rest.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch.distributed as dist

from megatron.core.models.mimo.wrappers import is_torch_native
from megatron.core.optimizer.grad_scaler import DynamicGradScaler
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.process_groups_config import ProcessGroupCollection

# Gathers over the world by which Megatron-Core constructs one optimizer.
_KEY_GATHERS = 2


def attend_construction(config: OptimizerConfig) -> None:
    """Answer the gathers of a module's optimizer that other ranks construct.

    ``get_megatron_optimizer`` compares the keys of parameter groups over the whole world, once for
    dense and once for expert parameters. A rank without the module has none.

    Raises:
        ValueError: for an optimizer whose construction gathers otherwise.
    """
    if config.optimizer not in ("adam", "sgd"):
        raise ValueError(
            f"optimizer '{config.optimizer}' needs every module to be trained on every rank; "
            "with modules on different ranks use 'adam' or 'sgd'"
        )
    for _ in range(_KEY_GATHERS):
        dist.all_gather_object([None] * dist.get_world_size(), [])


def build_inner_optimizer(
    name: str,
    modules: list[Any],
    config: OptimizerConfig,
    collection: ProcessGroupCollection,
    overrides: Mapping[Any, Any] | None,
) -> MegatronOptimizer:
    """Build stock's optimizer of one module; every rank that trains the module calls this together.

    Args:
        name: of the module, for errors.
        modules: its parts on this rank, wrapped in DDP or bare.
        config: of the optimizer.
        collection: the module's groups.
        overrides: other settings of some parameters, as stock takes them.

    Raises:
        ValueError: the module asks for several distributed-optimizer instances.
    """
    from megatron.core.optimizer import get_megatron_optimizer

    ddp_config = getattr(modules[0], "ddp_config", None)
    instances = getattr(ddp_config, "num_distributed_optimizer_instances", 1)
    if instances != 1:
        raise ValueError(
            f"module '{name}' asks for {instances} distributed-optimizer instances; "
            "the MIMO optimizer supports 1: set num_distributed_optimizer_instances=1"
        )
    optimizer = get_megatron_optimizer(
        config=config,
        model_chunks=modules,
        config_overrides=overrides,  # type: ignore[arg-type]
        pg_collection=collection,
        use_gloo_process_groups=False,
    )
    _count_expert_copies_over_expert_tp(optimizer, collection)
    _find_parameters_where_they_are_stepped(optimizer)
    return optimizer


def own_config(config: OptimizerConfig, modules: Sequence[Any]) -> OptimizerConfig:
    """Return the configuration of one module's optimizer.

    Torch-native modules have no buffers of DDP's that a distributed optimizer could cut; where
    FSDP cuts their weights the optimizer's state is cut with them.
    """
    if any(map(is_torch_native, modules)):
        return replace(config, use_distributed_optimizer=False)
    return config


def count_over_fsdp(
    optimizer: MegatronOptimizer, modules: Sequence[Any], collection: ProcessGroupCollection
) -> None:
    """Let norm and zeros count over data ranks, too, where FSDP gave each other gradients."""
    if any(getattr(module, "fsdp", False) is True for module in modules):
        for inner in inner_optimizers([optimizer]):
            inner.grad_stats_parallel_group = collection.intra_dist_opt


def _count_expert_copies_over_expert_tp(
    optimizer: MegatronOptimizer, collection: ProcessGroupCollection
) -> None:
    """The norm counts a whole parameter of an expert once per expert-TP group, not per TP group.

    Megatron-Core 0.16 gives every optimizer the TP group, and would leave out the biases of
    experts that sit on other TP ranks than the first.
    """
    for inner in inner_optimizers([optimizer]):
        if any(group.get("is_expert_parallel") for group in inner.param_groups):
            inner.tp_group = collection.expt_tp


def _find_parameters_where_they_are_stepped(optimizer: MegatronOptimizer) -> None:
    """A distributed optimizer finds a parameter's state by its place in a group.

    It steps a group's fp32 parameters first, but numbers them as they come: where a group has both,
    it would save and load the state of one parameter as another's.
    """
    for inner in inner_optimizers([optimizer]):
        if not hasattr(inner, "model_param_group_index_map"):
            continue
        groups = zip(inner.model_fp32_groups, inner.model_float16_groups, strict=True)
        for number, (whole, halves) in enumerate(groups):
            for place, parameter in enumerate([*whole, *halves]):
                inner.model_param_group_index_map[parameter] = (number, place)


def inner_optimizers(optimizers: Sequence[Any]) -> list[Any]:
    """Return each link of chains: a module with experts has an optimizer for them and the rest.

    A chain of several has no ``get_parameters`` in Megatron-Core 0.16.
    """
    chains = [getattr(opt, "chained_optimizers", None) for opt in optimizers]
    # A list; a mock answers to any name.
    links = [c if isinstance(c, list) else [o] for c, o in zip(chains, optimizers, strict=True)]
    return [inner for chain in links for inner in chain]


def dynamic_scalers(optimizers: Sequence[Any]) -> list[DynamicGradScaler]:
    """Return the loss scalers that follow found-inf; none unless training in fp16."""
    scalers = (getattr(opt, "grad_scaler", None) for opt in inner_optimizers(optimizers))
    return [scaler for scaler in scalers if isinstance(scaler, DynamicGradScaler)]


@contextlib.contextmanager
def held_scales(scalers: list[DynamicGradScaler]) -> Iterator[None]:
    """Keep loss scales, inside: an optimizer's ``prepare_grads`` does not update its own."""
    for scaler in scalers:
        vars(scaler)["update"] = lambda _found_inf: None
    try:
        yield
    finally:
        for scaler in scalers:
            del scaler.update


def count_zeros_of(optimizer: MegatronOptimizer) -> int:
    """Zero gradient elements of one module.

    Each optimizer of a chain counts its own: it knows the module's TP group, which the chain of
    0.16 looks up among the global groups.
    """
    return sum(int(inner.count_zeros()) for inner in inner_optimizers([optimizer]))
