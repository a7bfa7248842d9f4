# SPDX-License-Identifier: Apache-2.0
"""What a pipelined step asks of the model and of its arguments, before any collective."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch.distributed.fsdp import FSDPModule

from megatron.core.models.mimo.comm.routed_bridge import RoutedBridge
from megatron.core.models.mimo.config.role import MIMO_LANGUAGE_MODULE_KEY, ModuleLayout
from megatron.core.models.mimo.model.base import MimoModel
from megatron.core.models.mimo.model.ddp_methods import first_microbatch_layers, in_low_precision
from megatron.core.process_groups_config import ProcessGroupCollection


def check_step(
    mimo: MimoModel,
    num_microbatches: int,
    groups: ProcessGroupCollection,
    encode_ahead: int | None,
) -> None:
    """Refuse what cannot run; no rank's data is looked at, so all ranks refuse alike.

    Args:
        mimo: the whole model.
        num_microbatches: of the step.
        groups: the language model's.
        encode_ahead: microbatches that are encoded together; ``None`` for all.

    Raises:
        ValueError: see :func:`.forward_backward_pipelined`.
    """
    if num_microbatches < 1:
        raise ValueError(f"num_microbatches must be 1 or more, got {num_microbatches}")
    chunks = len(mimo.language_stages())
    if chunks > 1 and groups.pp.size() == 2 and mimo.config.batch_p2p_comm:
        raise ValueError(
            "An interleaved pipeline of 2 ranks sends two tensors to the same rank at a time, and "
            "batched exchanges mix them up; set overlap_p2p_comm=True and batch_p2p_comm=False in "
            "the language config"
        )
    if chunks > 1 and groups.pp.size() == 2 and mimo.config.variable_seq_lengths:
        raise ValueError(
            "An interleaved pipeline of 2 ranks cannot tell lengths that differ: what each tells "
            "the other on the way forward and back is mixed up; pad microbatches to one length "
            "(variable_seq_lengths=False), or use more ranks or no virtual stages"
        )
    if encode_ahead is not None and encode_ahead < num_microbatches and chunks > 1:
        raise ValueError(
            f"encode_ahead={encode_ahead} of {num_microbatches} microbatches needs one stage per "
            f"rank, this language model has {chunks} virtual ones: its first stage begins "
            "microbatches in another order; use None, or a pipeline without virtual stages"
        )
    if encode_ahead is not None and encode_ahead < 1:
        raise ValueError(
            f"encode_ahead must be 1 or more microbatches, got {encode_ahead}; None encodes all "
            "of the step together"
        )
    if mimo.role.mode is not ModuleLayout.COLOCATED:
        raise ValueError(
            "forward_backward_pipelined runs colocated models; modules on different ranks go "
            "over stock's multi-module schedules"
        )
    for name, module in mimo.modality_submodules.items():
        for key, part in first_microbatch_layers(module):
            cached = not getattr(
                getattr(part, "config", None), "disable_parameter_transpose_cache", False
            )
            if in_low_precision(part) and cached:
                raise ValueError(
                    f"'{key}' of modality '{name}' computes in fp8 and keeps its weights so from "
                    "the first microbatch on, but in a pipelined step encoders are not told which "
                    "one that is; set disable_parameter_transpose_cache=True in its config"
                )
    bridged = {modality for modality, _ in mimo.colocated_comms}
    if bridged != set(mimo.modality_submodules) or not mimo.mimo_config.module_to_grid_map:
        raise ValueError(
            f"forward_backward_pipelined needs a bridge for each modality "
            f"({sorted(mimo.modality_submodules)}), the model has some for {sorted(bridged)}; "
            "build it with MimoModelConfig(module_to_grid_map=...)"
        )
    grids: Any = mimo.mimo_config.module_to_grid_map
    grid = grids[MIMO_LANGUAGE_MODULE_KEY]
    if groups.pp.size() != grid.dim_size("pp"):
        raise ValueError(
            f"pg_collection has {groups.pp.size()} pipeline stages, the language grid "
            f"{grid.dim_size('pp')}; pass the language model's groups"
        )


def check_bubbles(
    mimo: MimoModel,
    num_microbatches: int,
    groups: ProcessGroupCollection,
    encode_ahead: int | None,
    encode_in_bubbles: int,
) -> None:
    """Refuse to encode in bubbles what cannot be; all ranks refuse alike.

    Args:
        mimo, num_microbatches, groups, encode_ahead: as for :func:`check_step`.
        encode_in_bubbles: microbatches of the step.

    Raises:
        ValueError: see :func:`.forward_backward_pipelined`.
    """
    if encode_in_bubbles == 0:
        return
    asked, stages = f"encode_in_bubbles={encode_in_bubbles}", groups.pp.size()
    if stages == 1 or len(mimo.language_stages()) > 1:
        has = "no pipeline stages" if stages == 1 else "virtual stages"
        raise ValueError(
            f"{asked} fills the bubbles of 1F1B, and this language model has {has}; use "
            + ("encode_ahead, or 0" if stages == 1 else "0, or a pipeline without virtual stages")
        )
    if encode_ahead is not None:
        raise ValueError(
            f"{asked} and encode_ahead={encode_ahead} say both when microbatches are encoded; set "
            "one of them"
        )
    if not 0 < encode_in_bubbles <= num_microbatches - stages:
        raise ValueError(
            f"{asked} of {num_microbatches} microbatches: the first stage begins with {stages} "
            f"before it waits for the others, so it can be 0 to {max(num_microbatches - stages, 0)}"
        )
    for (name, _), bridge in mimo.colocated_comms.items():
        if not isinstance(bridge, RoutedBridge):
            raise ValueError(
                f"{asked} needs a routed bridge for each modality, '{name}' has another one, whose "
                "ranks meet while they encode; use bridge='routed', or 0"
            )
        if bridge.guard != "always":
            raise ValueError(
                f"{asked} needs bridge_guard='always', got {bridge.guard!r}: a rank whose encoder "
                "fails in the middle of the pipeline is heard of over it"
            )
        replica, stage = bridge.layout.src_dp, bridge.layout.dest_pp
        _, first = np.unique(replica, return_index=True)
        if (stage != stage[first[replica]]).any():
            raise ValueError(
                f"{asked}: an encoder replica of '{name}' has ranks on several pipeline stages, "
                "which wait for each other while they encode and have their bubbles at other "
                "times; use a layout of the encoder whose tp * cp ranks are on one stage, or 0"
            )
    for name, module in mimo.modality_submodules.items():
        experts = any(
            getattr(getattr(part, "config", None), "expert_model_parallel_size", 1) > 1
            for part in module.modules()
        )
        if experts or any(isinstance(part, FSDPModule) for part in module.modules()):
            raise ValueError(
                f"{asked}: replicas of '{name}' wait for each other while they encode, with "
                + ("experts that they share out" if experts else "weights that FSDP has cut")
                + "; use 0"
            )
