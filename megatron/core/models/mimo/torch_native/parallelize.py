# SPDX-License-Identifier: Apache-2.0
"""``parallelize``: a model of transformers over a grid, in place."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.models.mimo.torch_native.agreed import (
    batch_digest,
    model_digest,
    raise_if_different,
    raise_on_all,
)
from megatron.core.models.mimo.torch_native.checks import blocks_of, model_problem, styled
from megatron.core.models.mimo.torch_native.context_parallel import (
    attend_over_cp,
    context_parallel_problem,
)
from megatron.core.models.mimo.torch_native.loss import causal_loss
from megatron.core.models.mimo.torch_native.meshes import (
    FSDP,
    TP,
    grid_problem,
    keep_mesh,
    mesh_of,
)
from megatron.core.models.mimo.torch_native.plans import Plan, Style, plan_of
from megatron.core.models.mimo.torch_native.styles import TensorParallel, joined


@dataclass(frozen=True)
class _Options:
    sequence_parallel: bool
    loss_parallel: bool
    fsdp: bool
    activation_checkpointing: bool
    precision: torch.dtype | MixedPrecisionPolicy | None
    cut_sequence: bool

    def problem(self, model: Any, cp: int) -> str:
        if self.precision is not None and not self.fsdp:
            return (
                f"precision={self.precision} is FSDP's, got fsdp=False; convert the model instead: "
                "model.to(torch.bfloat16)"
            )
        if self.activation_checkpointing and not model.supports_gradient_checkpointing:
            return f"{type(model).__name__} has no activation checkpointing in transformers"
        if cp > 1:
            policy = self.precision
            cast = isinstance(policy, MixedPrecisionPolicy)
            return context_parallel_problem(model, policy.param_dtype if cast else policy)
        return ""


def parallelize(
    model: Any,
    grid: HyperCommGrid,
    *,
    plan: Plan | None = None,
    sequence_parallel: bool = True,
    loss_parallel: bool = True,
    fsdp: bool = True,
    activation_checkpointing: bool = False,
    precision: torch.dtype | MixedPrecisionPolicy | None = None,
    cut_sequence: bool = True,
) -> Any:
    """Shard a model of transformers over a grid, in place, and return it; all its ranks call it.

    Each data rank calls the model on its own samples, the ranks of a TP group on the same ones.
    ``model(input_ids, labels=labels).loss`` is then the mean over the tokens of all data ranks,
    alike on all of them, and after ``backward`` gradients are those of it: FSDP adds up, it does
    not average. With several microbatches give each ``num_items_in_batch``, the labels of all.
    Any sequence length works, over CP any multiple of ``2 * cp``. With tp 1 no module is split,
    with one rank nothing is changed.

    With ``cp`` above 1 the ranks of a CP group are called with the same samples, too, and each
    runs its chunks of them: logits and other outputs are those of its chunks, ``(B, S/cp, ...)``.
    FSDP then shards over ``cp`` times ``dp``, and loss and gradients are still those of all. In
    every forward what one rank has to refuse is refused by all that FSDP connects, without FSDP
    by the ranks of the CP group.

    Args:
        model: as transformers builds it, with the same weights on every rank.
        grid: with dims ``tp`` and ``dp``, maybe ``cp``.
        plan: how modules are split; None takes the family's.
        sequence_parallel: norms and residuals on 1/tp of the sequence; else on each rank.
        loss_parallel: logits come back as a ``DTensor`` split by vocabulary; else whole.
        fsdp: shard weights over ``cp`` times ``dp`` (FSDP2), block by block. Without it every
            rank of them keeps its TP part, and adding up gradients over both is the caller's:
            over ``grid.get_or_create_pg(["cp", "dp"])``, or ``"dp"`` without ``cp``.
        activation_checkpointing: compute blocks again in backward; dropout is replayed.
        precision: in which FSDP computes, such as ``torch.bfloat16``; gradients are summed in
            fp32, weights keep their dtype. A policy of FSDP's is taken as it is.
        cut_sequence: whole sequences are given, of which each CP rank takes its chunks; else the
            caller gives chunks, see :func:`.own_chunks`, with ``position_ids`` and
            ``shift_labels`` of them. Without CP there is nothing to cut.

    Raises:
        ValueError: on all ranks, before the model is changed: no plan, a grid, a plan or sizes
            that do not fit, ranks that disagree.
    """
    options = _Options(
        sequence_parallel, loss_parallel, fsdp, activation_checkpointing, precision, cut_sequence
    )
    if grid_problem(grid):
        raise ValueError(grid_problem(grid))
    if not grid.is_current_rank_in_grid():
        raise ValueError(f"rank {dist.get_rank()} is not in the grid; only its ranks shard a model")
    mesh = mesh_of(grid, next(model.parameters()).device.type)
    cp = grid.get_or_create_pg("cp") if grid.dim_size("cp") > 1 else None
    plan = _agreed_plan(model, plan, mesh, options, 1 if cp is None else cp.size())
    if options.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if mesh[TP].size() > 1:
        _split(model, plan, mesh, options)
    if fsdp and (mesh[FSDP].size() > 1 or precision is not None):
        _fully_shard(model, blocks_of(model, plan), mesh, precision)
    if mesh.size() > 1 and Style.LOGITS in plan.outer.values():
        model.loss_function = causal_loss(mesh.get_group(FSDP))
    alike = {"a TP group": mesh.get_group(TP)} if mesh[TP].size() > 1 else {}
    if cp is not None:
        together = mesh.get_group(FSDP) if fsdp else cp
        attend_over_cp(model, cp, cut_sequence=cut_sequence, together=together)
        alike |= {"a CP group": cp} if cut_sequence else {}
    if alike:
        _check_first_batch(model, alike)
    if mesh[TP].size() > 1 or cp is not None:
        model.register_forward_pre_hook(_refuse_attentions, with_kwargs=True, prepend=True)
    keep_mesh(model, mesh)
    return model


def _agreed_plan(
    model: Any, plan: Plan | None, mesh: DeviceMesh, options: _Options, cp: int
) -> Plan:
    groups = [mesh.get_group(TP), mesh.get_group(FSDP)]
    problem = options.problem(model, cp)
    try:
        plan = plan or plan_of(model.config)
        problem = problem or model_problem(model, plan, mesh[TP].size())
    except ValueError as error:
        problem = problem or str(error)
    raise_on_all(problem, groups)
    assert plan is not None
    asked = repr((type(model).__name__, plan, options))
    raise_if_different("arguments of parallelize", asked, "give the same on all ranks", groups)
    remedy = "load the same folder, or set the same seed before building the model"
    raise_if_different("weights", model_digest(model), remedy, groups)
    return plan


def _split(model: Any, plan: Plan, mesh: DeviceMesh, options: _Options) -> None:
    tensor_parallel = TensorParallel(mesh[TP], options.sequence_parallel, options.loss_parallel)
    modules = dict(model.named_modules())
    for name, style in styled(model, plan).items():
        tensor_parallel.apply(name, modules[name], style)
    keep = ("logits",) if options.loss_parallel else ()
    model.register_forward_hook(lambda _, args, output: joined(output, keep))


def _fully_shard(
    model: nn.Module,
    blocks: list[nn.Module],
    mesh: DeviceMesh,
    precision: torch.dtype | MixedPrecisionPolicy | None,
) -> None:
    policy = precision
    if policy is None:
        policy = MixedPrecisionPolicy()
    elif isinstance(policy, torch.dtype):
        policy = MixedPrecisionPolicy(param_dtype=policy, reduce_dtype=torch.float32)
    for block in blocks:
        # The last is needed again at once: backward begins with it.
        again = block is not blocks[-1]
        fully_shard(block, mesh=mesh[FSDP], mp_policy=policy, reshard_after_forward=again)
    fully_shard(model, mesh=mesh[FSDP], mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Added up, not averaged, and by an operation that every backend has.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _check_first_batch(model: nn.Module, groups: dict[str, dist.ProcessGroup]) -> None:
    """Compare the arguments of the first forward of the ranks that ``groups`` connect."""
    signature = inspect.signature(model.forward)

    def compare(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        handle.remove()
        inputs = signature.bind_partial(*args, **kwargs).arguments
        inputs = {**inputs.pop("kwargs", {}), **inputs}
        named = " and of ".join(groups)
        remedy = f"ranks of {named} take the same samples: choose them by the dp coordinate"
        raise_if_different("inputs", batch_digest(inputs), remedy, list(groups.values()))

    handle = model.register_forward_pre_hook(compare, with_kwargs=True, prepend=True)


def _refuse_attentions(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    asked = kwargs.get("output_attentions")
    if model.config.output_attentions if asked is None else asked:
        raise ValueError(
            "output_attentions=True: under tp and cp a rank has the weights of its own heads and "
            "tokens only; ask the unsharded model"
        )
