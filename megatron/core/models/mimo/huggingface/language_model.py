# SPDX-License-Identifier: Apache-2.0
"""Stock's GPT as Hugging Face's decoders are: their rotary frequencies, a padded vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megatron.core.models.mimo.huggingface.rotary import InterleavedRotaryEmbedding, Rotary
from megatron.core.models.mimo.transformer.exact_loss import ExactLossGPTModel


class ImportedGPTModel(ExactLossGPTModel):
    """``GPTModel`` with the frequencies of a configuration and rows of padding that never count.

    Args:
        real_vocab_size: entries of the vocabulary that are tokens; the rest of ``vocab_size``
            is padding, whose logits are the lowest number of their dtype, so that they can
            neither win nor count in a sum.
        rotary: of the configuration; None without rotary embeddings.
        **stock: as ``GPTModel`` takes them.
    """

    def __init__(self, *, real_vocab_size: int, rotary: Rotary | None = None, **stock: Any) -> None:
        super().__init__(**stock)
        self.real_vocab_size = real_vocab_size
        if self.pre_process and self.embedding.add_position_embedding:
            # Stock makes this one table in torch's default dtype.
            table = self.embedding.position_embeddings.weight
            table.data = table.data.to(self.config.params_dtype)
        if rotary is not None:
            self._set_rotary(rotary)
        if self.post_process and real_vocab_size < self.vocab_size:
            self.output_layer.register_forward_hook(self._mask_padding)

    def _set_rotary(self, rotary: Rotary) -> None:
        before = self.rotary_pos_emb
        if rotary.interleaved:
            self.rotary_pos_emb = InterleavedRotaryEmbedding(
                kv_channels=self.config.kv_channels,
                rotary_percent=1.0,
                cp_group=self.pg_collection.cp,
            )
        self.rotary_pos_emb.inv_freq = rotary.on(before.inv_freq.device)

    def _mask_padding(self, _layer: nn.Module, _inputs: Any, output: tuple[Tensor, Any]) -> Any:
        """Set this rank's padded logits, in place: a linear layer's backward does not need them."""
        logits, bias = output
        width = logits.shape[-1]
        real = self.real_vocab_size - self.pg_collection.tp.rank() * width
        if width == self.vocab_size:  # gathered
            real = self.real_vocab_size
        if real < width:
            logits[..., max(real, 0) :] = torch.finfo(logits.dtype).min
        return logits, bias
