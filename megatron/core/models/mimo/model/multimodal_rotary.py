# SPDX-License-Identifier: Apache-2.0
"""Multimodal rotary embeddings of sequences that are cut over CP ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.distributed import ProcessGroup

from megatron.core.models.common.embeddings.rotary_pos_embedding import MultimodalRotaryEmbedding
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.utils import unwrap_model


@contextmanager
def rotary_positions_of(
    language_model: nn.Module, packed: PackedSeqParams | None, cp_group: ProcessGroup | None
) -> Iterator[None]:
    """Bring a batch's own (3-D) position ids to the tokens that they belong to, inside.

    Multimodal rotary embeddings cut the angles of all positions over CP as if the batch were one
    sequence, over Megatron's global CP group unless they are told another one; so they are told
    the language model's. Of a packed batch the layers would then take each sequence's part of
    what is left, which is another position's. Given the angles of all positions, stock's layers
    cut them sequence by sequence, so there the embedding is kept from cutting.

    Args:
        language_model: bare or wrapped.
        packed: of a packed batch; ``None`` for a dense one.
        cp_group: the language model's; ``None`` without CP.

    Raises:
        ValueError: rotary embeddings are fused: their kernel counts positions by itself.
    """
    rotary: Any = getattr(unwrap_model(language_model), "rotary_pos_emb", None)
    if not isinstance(rotary, MultimodalRotaryEmbedding):
        yield
        return
    if packed is not None and unwrap_model(language_model).config.apply_rope_fusion:
        raise ValueError(
            "apply_rope_fusion=True does not take the position ids of multimodal rotary embeddings "
            "in packed batches; set it to False"
        )
    before, rotary.cp_group = rotary.cp_group, None if packed is not None else cp_group
    try:
        yield
    finally:
        rotary.cp_group = before
