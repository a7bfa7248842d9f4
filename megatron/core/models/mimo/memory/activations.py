# SPDX-License-Identifier: Apache-2.0
"""Applies a modality's memory policy to its two parts: the encoders, and the projection."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from megatron.core.models.mimo.memory.offload import HostUse, OffloadedPart
from megatron.core.models.mimo.memory.policy import KEEP, OFFLOAD, RECOMPUTE, EncoderMemory
from megatron.core.models.mimo.memory.recomputed import recomputed
from megatron.core.utils import unwrap_model


class ActivationMemory:
    """What becomes of the activations of one modality's forward passes.

    Args:
        policy: the choice.
        encoders, projections: the modality's parts.

    Attributes:
        host: use of host memory.

    Raises:
        ValueError: a part that cannot be offloaded or recomputed; see :func:`_refuse`.
    """

    def __init__(
        self, policy: EncoderMemory, encoders: nn.Module, projections: nn.Module
    ) -> None:
        _refuse(policy.encoder, "encoder", encoders)
        _refuse(policy.projector, "projector", projections)
        self.policy = policy
        self._encoders, self._projections = encoders, projections
        self.host = HostUse()
        self._latest: OffloadedPart | None = None
        self._before: weakref.ref[OffloadedPart] | None = None

    def run(
        self,
        encode: Callable[[], torch.Tensor | None] | None,
        project: Callable[[torch.Tensor | None], torch.Tensor | None],
        rows: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """Run one forward pass of the modality.

        Args:
            encode: inputs -> the encoders' rows, or None without any; None for rows given here.
            project: these rows -> what goes over the bridge.
            rows: where there is nothing to encode.
        """
        policy = self.policy
        offloading = torch.is_grad_enabled() and policy.uses(OFFLOAD)
        hooks = self._offloaded().hooks if offloading else nullcontext
        if encode is not None:
            # A frozen encoder would run again only for its output's sake.
            trains = _trains(self._encoders)
            if trains and policy.encoder == policy.projector == RECOMPUTE:
                return recomputed(lambda: project(encode()), trains=True)
            if policy.encoder == RECOMPUTE:
                rows = recomputed(encode, trains=trains)
            else:
                with _where(policy.encoder == OFFLOAD, hooks):
                    rows = encode()
        if rows is None:
            return None
        if policy.projector == RECOMPUTE:
            # What stays is the encoders' output, so it goes where theirs does.
            with _where(policy.encoder == OFFLOAD, hooks):
                return recomputed(project, rows, trains=_trains(self._projections))
        with _where(policy.projector == OFFLOAD, hooks):
            return project(rows)

    def take_latest(self) -> OffloadedPart | None:
        """Return what the latest forward pass has on the host, for once; None without any."""
        latest, self._latest = self._latest, None
        return latest

    def _offloaded(self) -> OffloadedPart:
        parts = (self._encoders, self._projections)
        stays = [tensor for part in parts for tensor in _lasting(part)]
        before = None if self._before is None else self._before()
        part = OffloadedPart(stays, self.policy.offload_from, self.host, before)
        self._latest, self._before = part, weakref.ref(part)
        return part


def latest_offloaded(submodule: Any) -> OffloadedPart | None:
    """Return what a modality's latest forward pass has on the host, for once.

    Args:
        submodule: the modality, bare or wrapped, of this project's class or another.
    """
    memory = getattr(unwrap_model(submodule), "activation_memory", None)
    return memory.take_latest() if isinstance(memory, ActivationMemory) else None


def _lasting(part: nn.Module) -> Iterator[torch.Tensor]:
    yield from part.parameters()
    yield from part.buffers()


def _trains(part: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in part.parameters())


def _where(condition: bool, hooks: Callable[[], Any]) -> AbstractContextManager[Any]:
    return hooks() if condition else nullcontext()


def _refuse(policy: str, name: str, part: nn.Module) -> None:
    """What a policy cannot do with a part.

    Raises:
        ValueError: anything but keeping under ``gradient_accumulation_fusion``; recomputing in 8
            or 4 bits.
    """
    configs = [config for module in part.modules() if (config := getattr(module, "config", None))]
    if policy != KEEP and any(
        getattr(config, "gradient_accumulation_fusion", False) for config in configs
    ):
        raise ValueError(
            f"EncoderMemory {name}={policy!r} needs gradient_accumulation_fusion=False in the "
            f"{name}'s config, got True: its kernels note on the weight itself that its gradient "
            "is there, and of what autograd does not keep as it is they see a copy; set it to "
            "False, or use recompute_granularity='full' in the config"
        )
    if policy == RECOMPUTE and any(
        getattr(config, kind, None) for config in configs for kind in ("fp8", "fp4")
    ):
        raise ValueError(
            f"EncoderMemory {name}='recompute' does not carry the scaling of fp8 and fp4 over; "
            f"use recompute_granularity='full' in the {name}'s config, or 'offload'"
        )
