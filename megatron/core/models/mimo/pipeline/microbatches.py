# SPDX-License-Identifier: Apache-2.0
"""Microbatches as mappings of ``MimoModel.forward``'s keyword arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from megatron.core.models.mimo.comm.plan.gather_layout import SliceInfo

# Arguments of the language side and the tensor dim that counts samples, from the end: position
# ids may have a leading dim, one entry per channel of multimodal rotary embeddings.
_SAMPLE_DIM = {
    "input_ids": -2,
    "position_ids": -2,
    "labels": -2,
    "loss_mask": -2,
}


def narrow_language_batch(batch: Mapping[str, Any], part: SliceInfo) -> dict[str, Any]:
    """Return the language side of some of a microbatch's samples; everything else stays.

    A loader that reads for an encoder replica gives each of the language replicas that share its
    samples (fan-out) their own ones this way; which ones they are says
    ``BridgeLayout.slot_slice``. Encoder inputs stay as they are: they are the encoder replica's.

    Args:
        batch: with ``input_ids``, ``labels`` and ``loss_mask`` ``(B, S)`` and ``position_ids``
            ``(B, S)`` or ``(R, B, S)``, as far as it has them.
        part: of the samples.

    Raises:
        ValueError: the part lies outside the samples; an attention mask or packed sequences, which
            cannot be cut by samples.
    """
    for name in ("attention_mask", "packing_kwargs"):
        if batch.get(name) is not None:
            raise ValueError(
                f"A batch with {name} cannot be narrowed by samples; read each language replica's "
                "samples apart"
            )
    narrowed = dict(batch)
    for name, dim in _SAMPLE_DIM.items():
        value = batch.get(name)
        if value is None:
            continue
        if not 0 <= part.start <= part.start + part.size <= value.size(dim):
            raise ValueError(
                f"{name} {tuple(value.shape)} has {value.size(dim)} samples, wanted are "
                f"{part.start} to {part.start + part.size - 1}"
            )
        narrowed[name] = torch.narrow(value, dim, part.start, part.size)
    return narrowed
