# SPDX-License-Identifier: Apache-2.0
"""Gradients of all modules brought to their final value after backward.

DDP only sums (``calculate_per_token_loss=True``): after backward, each module's gradient is the
gradient of the *sum* of token losses over the global batch. One number, the valid tokens of the
whole batch, then divides both modules. Any other divisor is wrong by a constant factor that Adam
and norm clipping hide.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.distributed.distributed_data_parallel_config import (
    DistributedDataParallelConfig,
)
from megatron.core.models.mimo.config.role import MIMO_LANGUAGE_MODULE_KEY
from megatron.core.models.mimo.gradients.bucket_order import reduce_in_one_order
from megatron.core.models.mimo.gradients.nonfinite import ranks_text
from megatron.core.models.mimo.model.rank_modules import stages_of
from megatron.core.models.mimo.torch_native.data_parallel import TorchNativeParallel
from megatron.core.models.mimo.torch_native.part import native_parts
from megatron.core.models.mimo.training.agreement import gathered
from megatron.core.models.mimo.training.experts import check_expert_sizes, mark_expert_parameters
from megatron.core.models.mimo.training.pretrained import refuse_different_weights
from megatron.core.models.mimo.wrappers import clean_name, is_torch_native, stepped
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import unwrap_model
from mimo_colocated import phases

if TYPE_CHECKING:
    from megatron.core.hyper_comm_grid import HyperCommGrid


def iter_modules(mimo_model: Any) -> Iterator[tuple[str, Any]]:
    """Yield (name, module) of the modules on this rank: the language model, then the modalities.

    Virtual pipeline stages of the language model come one by one, under its name.
    """
    for stage in stages_of(mimo_model):
        yield MIMO_LANGUAGE_MODULE_KEY, stage
    for name, module in mimo_model.modality_submodules.items():
        if module is not None:
            yield name, module


def wrap_modules_with_ddp(
    mimo_model: Any,
    configs: Mapping[str, Any],
    ddp_config: DistributedDataParallelConfig,
    collections: dict[str, ProcessGroupCollection],
) -> None:
    """Wrap every module of ``mimo_model`` in its own DistributedDataParallel, in place.

    Args:
        mimo_model: the model.
        configs: module name -> its TransformerConfig; ``calculate_per_token_loss`` must be on.
        ddp_config: settings for every module; each gets a copy, because DDP writes into it.
        collections: module name -> the module's groups.

    Raises:
        ValueError: if a config averages gradients instead of summing them, or describes experts
            that do not fit the module's groups (:func:`.experts.check_expert_sizes`); if weights
            are to be gathered that no distributed optimizer cuts.
    """
    if ddp_config.overlap_param_gather and not ddp_config.use_distributed_optimizer:
        raise ValueError(
            "overlap_param_gather=True gathers weights that a distributed optimizer has updated "
            "in parts, and use_distributed_optimizer is False; set it to True, or leave "
            "overlap_param_gather out"
        )
    modules = list(iter_modules(mimo_model))
    for name, _ in modules:
        if not configs[name].calculate_per_token_loss:
            raise ValueError(
                f"module '{name}' has calculate_per_token_loss=False: DDP would average its "
                "gradients over its own DP size, which differs between modules; set it to True"
            )
        check_expert_sizes(name, configs[name], collections[name])
    stages = []
    for name, module in modules:
        wrapped = _wrapped(module, configs[name], ddp_config, collections[name])
        if name == MIMO_LANGUAGE_MODULE_KEY:
            stages.append(wrapped)
        else:
            mimo_model.modality_submodules[name] = wrapped
    if stages:
        mimo_model.language_model = stages[0]
    for number, stage in enumerate(stages[1:]):
        mimo_model.virtual_stages[number] = stage


def _wrapped(
    module: torch.nn.Module, config: Any, ddp_config: Any, groups: ProcessGroupCollection
) -> torch.nn.Module:
    """The module in stock's wrapper, or where PyTorch shards it in the one that does so."""
    if native_parts(module):
        return TorchNativeParallel(config, ddp_config, module, groups)
    mark_expert_parameters(module)
    wrapped = DistributedDataParallel(config, copy(ddp_config), module, pg_collection=groups)
    reduce_in_one_order(wrapped)
    return wrapped


class MimoGradFinalizer:
    """``finalize_model_grads_func`` for a MimoModel.

    Per module: stock finalisation over the module's own groups (DDP sums, layer-norm sums over TP
    under sequence parallelism, tied embeddings over PP). Then one ``N_global``, counted over the
    language model's dp x cp, divides all of them.

    Args:
        collections: module name -> the module's groups; must hold ``"language"``.
        grids: module name -> its grid, needed where modules sit on different ranks: N_global then
            has to reach ranks outside the language model's grid, and every rank must know so.

    Raises:
        ValueError: if the language model's groups are missing, or this rank is outside its grid
            and no grids were given.
    """

    def __init__(
        self,
        collections: dict[str, ProcessGroupCollection],
        grids: dict[str, HyperCommGrid] | None = None,
    ) -> None:
        if MIMO_LANGUAGE_MODULE_KEY not in collections:
            raise ValueError(
                f"MimoGradFinalizer needs the groups of '{MIMO_LANGUAGE_MODULE_KEY}', "
                f"got {sorted(collections)}"
            )
        self.collections = collections
        self._first_step = True
        spans = {(grid.rank_offset, grid.size) for grid in (grids or {}).values()}
        self._colocated = len(spans) <= 1
        if self._colocated and collections[MIMO_LANGUAGE_MODULE_KEY].dp_cp is None:
            raise ValueError(
                f"rank {dist.get_rank()} is outside the grid of '{MIMO_LANGUAGE_MODULE_KEY}' and "
                "cannot count tokens with its groups: give MimoGradFinalizer the grids of all "
                "modules"
            )

    def __call__(
        self,
        model: list[torch.nn.Module],
        num_tokens: torch.Tensor | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        force_all_reduce: bool = False,
    ) -> None:
        """Finalise the gradients of ``model[0]``; called by Megatron-Core's schedules.

        Args:
            model: one MimoModel, possibly wrapped.
            num_tokens: scalar of any dtype, the sum of this rank's token weights over all
                microbatches. Reduced in place to the global sum. ``None`` leaves gradients
                undivided.
            pg_collection: the schedule's, which are the language model's; not read, since each
                module's were given at construction.
            force_all_reduce: as in Megatron-Core.

        Raises:
            ValueError: a parameter was frozen or unfrozen after its module was wrapped, or got no
                gradient that an overlapping reduction waits for; the latter, in the first step, is
                raised on every rank. Pretrained weights that differ between copies, likewise. So is
                a global sum of token weights that is negative or not finite; in later steps, which
                read nothing back, gradients become nan, and the optimizer skips the step.
        """
        phases.end_of_microbatches()
        phases.mark(phases.FINALIZE)
        mimo_model = unwrap_model(model[0])
        modules: dict[str, list[torch.nn.Module]] = {}
        for name, module in iter_modules(mimo_model):
            refuse_late_freezing(name, module)
            modules.setdefault(name, []).append(module)
        first, self._first_step = self._first_step, False
        refuse_missing_gradients(modules, together=first)
        if first:
            refuse_different_weights(_of_megatron(modules), self.collections)
        for name, parts in modules.items():
            self._finalize(name, parts, force_all_reduce)
        if num_tokens is None:
            return
        total = self._token_sum(num_tokens)
        num_tokens.copy_(total)
        if first:
            check_token_count(float(total))
        scaling = _scaling(total)
        for _, module in iter_modules(mimo_model):
            module.scale_gradients(scaling)

    def _finalize(self, name: str, parts: list[Any], force_all_reduce: bool) -> None:
        """Sum a module's gradients over its own groups."""
        if all(map(is_torch_native, parts)):
            for part in parts:
                part.finish_grad_sync()  # over TP PyTorch has summed them
            return
        finalize_model_grads(parts, None, self.collections[name], force_all_reduce=force_all_reduce)

    def reduce_token_count(self, num_tokens: torch.Tensor) -> torch.Tensor:
        """Turn this rank's valid tokens into ``N_global``, in place.

        CP ranks hold disjoint parts of a sample's tokens and DP ranks disjoint samples, so the
        sum runs over dp x cp; TP ranks hold copies and are left out. Only the last pipeline
        stage counts. Where some ranks are outside the language model's grid the sum runs over
        the world, and whoever has nothing of its own to add adds zero.
        """
        return num_tokens.copy_(self._token_sum(num_tokens))

    def _token_sum(self, num_tokens: torch.Tensor) -> torch.Tensor:
        """The global sum, whatever dtypes the ranks count in: stages without a loss have integers.

        A float64 holds every count exactly.
        """
        groups = self.collections[MIMO_LANGUAGE_MODULE_KEY]
        total = num_tokens.to(torch.float64, copy=True)
        if not self._colocated:
            if not _counts_tokens(groups):
                total.zero_()
            dist.all_reduce(total)
            return total
        if groups.pp is not None and groups.pp.size() > 1:
            last = dist.get_global_rank(groups.pp, groups.pp.size() - 1)
            dist.broadcast(total, src=last, group=groups.pp)
        dist.all_reduce(total, group=groups.dp_cp)
        return total


def _of_megatron(
    modules: Mapping[str, list[torch.nn.Module]],
) -> dict[str, list[torch.nn.Module]]:
    """Those whose weights nobody has compared: torch-native ones were when they were sharded."""
    return {
        name: [part for part in parts if not is_torch_native(part)]
        for name, parts in modules.items()
    }


def check_token_count(total: float) -> None:
    """Raise unless gradients can be divided by ``total``, or are zero without a token.

    Raises:
        ValueError: it is negative or not finite.
    """
    if not 0 <= total < float("inf"):
        raise ValueError(
            f"the token weights of the whole batch sum up to {total}, which gradients cannot be "
            "divided by; the loss mask must be finite and its sum not negative"
        )


def _scaling(total: torch.Tensor) -> torch.Tensor:
    """What gradients are multiplied by, without a look at ``total`` on the host.

    A batch without a single valid token has zero gradients; 1 keeps them zero, not nan. A sum that
    nothing can be divided by makes them nan, which the optimizer notices.
    """
    one, nothing = torch.ones_like(total), torch.full_like(total, float("nan"))
    usable = (total > 0) & total.isfinite()
    scaling = torch.where(usable, one / total, torch.where(total == 0, one, nothing))
    return scaling.to(torch.float32)


def refuse_late_freezing(name: str, module: torch.nn.Module) -> None:
    """Refuse weights that began or ceased to train after DDP made its gradient buffers.

    A parameter frozen later keeps its buffer and its optimizer state, so that momentum and weight
    decay go on moving it. One unfrozen later has neither and would never move.

    Raises:
        ValueError: a parameter of ``module`` was frozen or unfrozen since.
    """
    if not (isinstance(module, DistributedDataParallel) or is_torch_native(module)):
        return
    for key, parameter in module.named_parameters():
        if parameter.requires_grad is not _trained_when_wrapped(module, key, parameter):
            now = "unfrozen" if parameter.requires_grad else "frozen"
            raise ValueError(
                f"parameter '{clean_name(module, key)}' of module '{name}' was {now} after the "
                "module was wrapped in DistributedDataParallel; set requires_grad before wrapping. "
                "In mid-run: save a checkpoint, build the model anew with what is to train, and "
                "load it"
            )


def _trained_when_wrapped(module: torch.nn.Module, key: str, parameter: torch.Tensor) -> bool:
    if is_torch_native(module):
        return stepped(module).get_parameter(key.removeprefix("module.")).requires_grad
    return hasattr(parameter, "main_grad")


def refuse_missing_gradients(
    modules: Mapping[str, Sequence[torch.nn.Module]], *, together: bool
) -> None:
    """Refuse parameters without a gradient where reductions overlap the backward pass.

    A reduction starts when every parameter of a bucket has its gradient. Stock learns in the first
    step how many to wait for, and from the second one on asserts, or leaves the other replicas
    waiting, where one is missing.

    Args:
        modules: module name -> its parts on this rank.
        together: all ranks call it and see what any of them misses; else each looks for itself.

    Raises:
        ValueError: a parameter without a gradient; ``together``: the same on all ranks.
    """
    mine = {name: keys for name, parts in modules.items() if (keys := _without_gradient(parts))}
    everywhere = gathered(mine) if together else [mine]
    name = min((name for found in everywhere for name in found), default=None)
    if name is None:
        return
    key = next(found[name][0] for found in everywhere if name in found)
    missing = [rank for rank, found in enumerate(everywhere) if key in found.get(name, ())]
    missing = missing if together else [dist.get_rank()]
    raise ValueError(
        f"parameter '{key}' of module '{name}' trains, but got no gradient in this step "
        f"({ranks_text(missing)}), and overlap_grad_reduce waits for one of every parameter. "
        "If the model does not use it, freeze it before the module is wrapped "
        "(requires_grad_(False)); if only some batches do, set overlap_grad_reduce=False"
    )


def _without_gradient(parts: Sequence[torch.nn.Module]) -> list[str]:
    """Parameters that backward left out, of parts that reduce during backward and had one."""
    found = []
    for module in parts:
        if not isinstance(module, DistributedDataParallel):
            continue
        if module.ddp_config.overlap_grad_reduce:
            groups = module.bucket_groups + module.expert_parallel_bucket_groups
            ready = {p for group in groups for p in group.per_param_grad_ready_counts}
            late = {p for group in groups for p in group.params} - ready if ready else set()
            named = module.named_parameters()
            found += [clean_name(module, key) for key, parameter in named if parameter in late]
    return found


def _counts_tokens(groups: ProcessGroupCollection) -> bool:
    """True on one rank of each (dp, cp): the first of its TP group, on the last stage."""
    if groups.tp is None:
        return False
    last_stage = groups.pp is None or groups.pp.rank() == groups.pp.size() - 1
    return groups.tp.rank() == 0 and last_stage
