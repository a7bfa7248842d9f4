# SPDX-License-Identifier: Apache-2.0
"""The language rank of a non-colocated model: rows or hidden states come from other ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from megatron.core.models.mimo.config.role import MIMO_LANGUAGE_MODULE_KEY, RankRole
from megatron.core.models.mimo.model.language_batch import LanguageBatch
from megatron.core.models.mimo.model.language_runner import LanguageRunner
from megatron.core.utils import unwrap_model
from mimo_colocated import phases


def run_on_received(
    role: RankRole,
    language: LanguageRunner,
    language_model: Any,
    batch: LanguageBatch,
    input_tensors: Mapping[str, torch.Tensor] | None,
) -> tuple[Any, torch.Tensor | None]:
    """Run this rank's stage of the language model on what other ranks sent.

    Args:
        role: of the rank.
        language, language_model: of the rank.
        batch: its language batch.
        input_tensors: modality -> rows; ``"language"`` -> hidden states of the stage before.

    Returns:
        (output, CP-local loss mask); before the last stage the output is
        ``{"language": hidden states}``, for the schedule to route.
    """
    language.check_mask(batch)
    batch = language.packed(batch)
    received = dict(input_tensors or {})
    hidden_states = received.pop(MIMO_LANGUAGE_MODULE_KEY, None)
    fused = None
    if role.is_first_stage(MIMO_LANGUAGE_MODULE_KEY):
        phases.mark(phases.LANGUAGE_FORWARD)
        fused = language.fuse(batch, received)
    sharded = language.cut(batch, fused)
    inner = unwrap_model(language_model)
    takes_hidden_states = fused is None and hidden_states is not None
    if takes_hidden_states and hasattr(inner, "set_input_tensor"):
        inner.set_input_tensor(hidden_states)
    output, loss_mask = language.call(batch, sharded)
    if not role.is_last_stage(MIMO_LANGUAGE_MODULE_KEY):
        output = {MIMO_LANGUAGE_MODULE_KEY: output}
    return output, loss_mask


def unpacked(input_tensor: Any) -> Any:
    """Return what a schedule hands over without the lists around it: by module name, or one tensor.

    Args:
        input_tensor: as for ``MimoModel.set_input_tensor``.
    """
    tensors = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
    if isinstance(tensors, dict):
        return {name: _only(tensor) for name, tensor in tensors.items()}
    return tensors


def _only(value: Any) -> Any:
    """The entry of a list of one; anything else as it is."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value
