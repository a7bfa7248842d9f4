# SPDX-License-Identifier: Apache-2.0
"""The language side of a microbatch, as one object from ``forward`` to the language model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megatron.core.packed_seq_params import PackedSeqParams

_ARGUMENTS = (
    "input_ids",
    "position_ids",
    "attention_mask",
    "loss_mask",
    "labels",
    "packing_kwargs",
)


@dataclass(frozen=True, eq=False)
class LanguageBatch:
    """What a language replica gets in a microbatch, and what was found out about it.

    Attributes:
        input_ids: ``(B, S)``.
        position_ids: ``(B, S)`` or ``(R, B, S)``.
        attention_mask: see ``MimoModel.forward``.
        loss_mask, labels: ``(B, S)``.
        packing_kwargs: fields of ``PackedSeqParams``.
        problem: why it must not be run, found by whoever made it.
        packed: made of ``packing_kwargs`` by :meth:`.LanguageRunner.prepare`.
        lengths: of a packed batch under CP, its cumulative padded lengths on the host.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor | None
    attention_mask: torch.Tensor | None
    loss_mask: torch.Tensor | None
    labels: torch.Tensor | None
    packing_kwargs: Mapping[str, Any] | None
    problem: str | None = None
    packed: PackedSeqParams | None = None
    lengths: list[int] | None = None

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> LanguageBatch:
        """Take the language side out of ``forward``'s keyword arguments."""
        found: dict[str, Any] = {name: arguments.get(name) for name in _ARGUMENTS}
        return cls(**found)
