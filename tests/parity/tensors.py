# SPDX-License-Identifier: Apache-2.0
"""Shards of a rank gathered to whole tensors, under names that do not depend on the layout."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.models.mimo.torch_native.local_shards import Place
from megatron.core.models.mimo.training.global_names import global_modules, join
from megatron.core.models.mimo.wrappers import is_torch_native
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLP

_LANGUAGE_PREFIX = "language_model"
_EXPERTS = ".local_experts."


def named_parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """(global name, parameter) of this rank, each parameter once.

    Layers count over all pipeline stages. The head of a last stage that is tied to the word
    embeddings of the first goes by their name: the two are one weight.
    """
    seen: set[int] = set()
    tied, plain = _tied_heads(model), {id(own): part for own, part, _ in _native(model)}
    for name, module in global_modules(model):
        for key, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                own = plain.get(id(parameter), parameter)
                yield tied.get(id(parameter), join(name, key)), own


def _native(model: torch.nn.Module) -> Iterator[tuple[Any, Any, Place]]:
    """(parameter, this rank's part of it as a plain one, where that lies) of torch-native ones."""
    for module in model.modules():
        if is_torch_native(module):
            shards = module.local_shards
            for name, parameter, part in shards.pairs():
                yield parameter, part, shards.places[name]


def _tied_heads(model: torch.nn.Module) -> dict[int, str]:
    """Head weight (by id) -> name of the word embeddings it is tied to."""
    found = {}
    for name, module in global_modules(model):
        if isinstance(module, LanguageModule) and module.share_embeddings_and_output_weights:
            weight = getattr(getattr(module, "output_layer", None), "weight", None)
            if weight is not None:
                found[id(weight)] = join(name, "embedding.word_embeddings.weight")
    return found


def whole_tensors(
    model: torch.nn.Module,
    collections: dict[str, ProcessGroupCollection],
    values: dict[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Gather ``values``, which are shaped as this rank's parameters, over tensor parallelism.

    Experts are gathered over expert tensor parallelism; of them a rank has its EP rank's alone.

    A QKV weight is cut between query groups, so its shards follow each other. The first layer of
    a gated MLP holds the gate's shard and then the value's; both are put back where they belong.

    Args:
        model: whose parameters say how they are cut.
        collections: module name -> its groups.
        values: global parameter name -> tensor; the same names on all ranks of a TP group.
    """
    gated, places = _gated_layers(model), {id(part): place for _, part, place in _native(model)}
    whole = {}
    for name, parameter in named_parameters(model):
        if name not in values:
            continue
        groups = collections[_module_of(name, collections)]
        if id(parameter) in places:
            whole[name] = _joined(values[name], places[id(parameter)], groups.intra_dist_opt)
            continue
        tp = groups.expt_tp if _EXPERTS in name else groups.tp
        if tp.size() == 1 or not getattr(parameter, "tensor_model_parallel", False):
            whole[name] = values[name].clone()
            continue
        parts = all_gather(values[name], tp)
        blocks = 2 if id(parameter) in gated else max(parameter.partition_stride, 1)
        whole[name] = join_shards(parts, parameter.partition_dim, blocks)
    return whole


def _joined(part: torch.Tensor, place: Place, group: dist.ProcessGroup) -> torch.Tensor:
    """The whole tensor of which all ranks of a module have parts."""
    told: list[Any] = [None] * group.size()
    dist.all_gather_object(told, (place.slices(), part), group=group)
    whole = part.new_full(place.whole, torch.nan)
    for where, each in told:
        whole[where] = each.to(part.device)
    return whole


def _module_of(name: str, collections: dict[str, ProcessGroupCollection]) -> str:
    if name.startswith(_LANGUAGE_PREFIX):
        return "language"
    return next(key for key in collections if name.startswith(f"modality_submodules.{key}."))


def _gated_layers(model: torch.nn.Module) -> set[int]:
    mlps = [m for m in model.modules() if isinstance(m, MLP) and m.config.gated_linear_unit]
    return {id(p) for mlp in mlps for p in mlp.linear_fc1.parameters(recurse=False)}


def join_shards(parts: list[torch.Tensor], dim: int, blocks: int) -> torch.Tensor:
    """The whole tensor of which ``parts`` are the shards; the reverse of ``tp_shard``.

    >>> join_shards([torch.tensor([0, 1, 4, 5]), torch.tensor([2, 3, 6, 7])], 0, 2).tolist()
    [0, 1, 2, 3, 4, 5, 6, 7]
    """
    pieces = [part.chunk(blocks, dim=dim) for part in parts]
    return torch.cat([piece[block] for block in range(blocks) for piece in pieces], dim=dim)


def all_gather(tensor: torch.Tensor, group: dist.ProcessGroup) -> list[torch.Tensor]:
    """Every rank's tensor, in the group's order."""
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return parts


def complete_gradients(model: torch.nn.Module) -> None:
    """Fill the gradient buffers where the distributed optimizer has reduced a rank's part only."""
    for module in model.modules():
        if not isinstance(module, DistributedDataParallel):
            continue
        if not module.ddp_config.use_distributed_optimizer:
            continue
        for buffer in [*module.buffers, *module.expert_parallel_buffers]:
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                own = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                bucket.grad_data.copy_(torch.cat(all_gather(own, group)))


def local_gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Global name -> gradient of this rank's shard, of the parameters that train.

    Raises:
        AssertionError: a frozen parameter has a gradient.
    """
    found = {}
    for name, parameter in named_parameters(model):
        if parameter.requires_grad:
            found[name] = parameter.main_grad.detach().clone()
        else:
            untouched = parameter.grad is None and not hasattr(parameter, "main_grad")
            assert untouched, f"{name} is frozen and has a gradient"
    return found


def local_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Global name -> copy of this rank's shard of the weight.

    The optimizer's fp32 copy, where it has a whole one: bf16 weights hide what a step changed.
    """
    return {name: _main(p).detach().clone() for name, p in named_parameters(model)}


def _main(parameter: torch.nn.Parameter) -> torch.Tensor:
    main = getattr(parameter, "main_param", None)
    return parameter if main is None or main.shape != parameter.shape else main
