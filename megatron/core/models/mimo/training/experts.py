# SPDX-License-Identifier: Apache-2.0
"""Experts of a module: sizes that must agree, and which groups their gradients are summed over.

An expert lives on one EP rank of ``expt_tp`` shards and is copied ``expt_dp`` times. Tokens come to
it from all ranks of its EP x expert-TP group, so the sum of its gradients runs over ``expt_dp``
alone, while the router, like every dense weight, is summed over dp x cp (and over TP under sequence
parallelism, where each TP rank routes other tokens). Stock tells the two kinds apart by a
parameter's ``allreduce`` attribute.

**Experts without tokens.** An expert that gets no token on a rank still runs, on an empty tensor:
its gradient there is zero, not missing, so no bucket of an overlapping reduction waits for it. One
that gets none anywhere has a zero gradient on all its copies and is stepped like any other: weight
decay (and momentum of earlier steps) acts on it, alike on every copy.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron.core.models.mimo import compat
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import BaseMoELayer


def check_expert_sizes(name: str, config: Any, groups: ProcessGroupCollection) -> None:
    """Refuse a MoE config that its groups or this Megatron-Core version cannot train.

    Args:
        name: of the module, for the message.
        config: its TransformerConfig.
        groups: the module's process groups.

    Raises:
        ValueError: the config's EP or expert TP differs from the groups'; the experts do not divide
            over EP; TP without sequence parallelism; a router bias that this version updates over
            Megatron's global groups.
    """
    if getattr(config, "num_moe_experts", None) is None:
        return
    for what, group, axis in (
        ("expert_model_parallel_size", groups.ep, "ep"),
        ("expert_tensor_parallel_size", groups.expt_tp, "expt_tp"),
    ):
        if getattr(config, what) != group.size():
            raise ValueError(
                f"module '{name}' has {what}={getattr(config, what)} in its config and "
                f"{axis}={group.size()} in its grid; they must be equal, give make_grid "
                f"{axis}={getattr(config, what)} or change the config"
            )
    experts, ep = config.num_moe_experts, groups.ep.size()
    if experts % ep:
        raise ValueError(
            f"module '{name}' has num_moe_experts={experts}, which ep={ep} does not divide; "
            f"ep can be {[n for n in range(1, experts + 1) if experts % n == 0]}"
        )
    if groups.tp.size() > 1 and not config.sequence_parallel:
        raise ValueError(
            f"module '{name}' has experts and tp={groups.tp.size()} without sequence parallelism: "
            "every TP rank would send the same tokens; set sequence_parallel=True or tp=1"
        )
    if config.moe_router_enable_expert_bias and not compat.EXPERT_BIAS_TAKES_GROUPS:
        raise ValueError(
            f"module '{name}' has moe_router_enable_expert_bias=True, whose update uses Megatron's "
            "global process groups before megatron-core 0.19; use megatron-core 0.19 or an "
            'auxiliary loss (moe_router_load_balancing_type="seq_aux_loss")'
        )


def mark_expert_parameters(module: torch.nn.Module) -> None:
    """Let stock reduce and step expert parameters over the expert groups, at any EP.

    Stock does so from EP 2 on. At EP 1 it treats experts as dense weights, which is wrong where
    expert TP is not TP (0.16), and gives a checkpoint that fits EP 1 only: the chain of optimizers
    has one link less.

    Biases of experts are not summed over TP either, as stock does under sequence parallelism: TP
    ranks hold different experts, or copies whose gradients the expert groups have summed already.
    """
    for layer in module.modules():
        if isinstance(layer, BaseMoELayer):
            experts: Any = layer.experts
            for parameter in experts.parameters():
                parameter.allreduce = False
                parameter.sequence_parallel = False
