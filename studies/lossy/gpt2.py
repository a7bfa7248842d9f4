# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's ``GPT2ForSequenceClassification`` of Megatron's layers, at any TP.

Weights are Hugging Face's, cut. The classes are scored from the last token, so there is no padding.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.core.models.gpt import GPTModel
from megatron.core.models.mimo.training.initial_weights import tp_shard
from megatron.core.models.mimo.transformer.layer_specs import language_layer_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

# Megatron's names of a layer -> Hugging Face's.
_LAYER = {
    "input_layernorm": "ln_1",
    "self_attention.linear_qkv": "attn.c_attn",
    "self_attention.linear_proj": "attn.c_proj",
    "pre_mlp_layernorm": "ln_2",
    "mlp.linear_fc1": "mlp.c_fc",
    "mlp.linear_fc2": "mlp.c_proj",
}
_REST = {
    "embedding.word_embeddings.weight": "transformer.wte.weight",
    "embedding.position_embeddings.weight": "transformer.wpe.weight",
    "decoder.final_layernorm.weight": "transformer.ln_f.weight",
    "decoder.final_layernorm.bias": "transformer.ln_f.bias",
    "output_layer.score.weight": "score.weight",
}


class Score(nn.Module):
    """Scores of the classes, in place of GPT's output layer; a copy on every TP rank."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.score = nn.Linear(width, classes, bias=False)

    def forward(self, hidden: Tensor, **_stock: Any) -> tuple[Tensor, None]:
        """Return ``(1, b, classes)`` of ``(s, b, width)``: the last token's."""
        return self.score(hidden[-1:]), None


class Classifier(nn.Module):
    """Token ids ``(b, s)`` -> scores ``(b, classes)``.

    Args:
        gpt: with :class:`Score` as its output layer.
    """

    def __init__(self, gpt: GPTModel) -> None:
        super().__init__()
        self.gpt, self.config = gpt, gpt.config

    def forward(self, ids: Tensor) -> Tensor:
        """Return the scores."""
        positions = torch.arange(ids.size(1), device=ids.device).expand_as(ids)
        return self.gpt(ids, positions, None).squeeze(1)


def classifier(reference: Any, groups: ProcessGroupCollection) -> Classifier:
    """Return this rank's part of Hugging Face's model.

    Args:
        reference: a ``GPT2ForSequenceClassification`` without dropout.
        groups: of a layout of TP and DP.

    Raises:
        ValueError: TP divides its heads or its vocabulary not; it has dropout.
    """
    shape, tp = reference.config, groups.tp.size()
    dropout = max(shape.resid_pdrop, shape.embd_pdrop, shape.attn_pdrop)
    if shape.n_head % tp or shape.vocab_size % tp or dropout:
        raise ValueError(
            f"TP {tp} must divide {shape.n_head} heads and a vocabulary of {shape.vocab_size}, and "
            f"the dropout be 0, got {dropout}; give another size, or another TP"
        )
    gpt = GPTModel(
        _config(shape, tp),
        language_layer_spec(_config(shape, tp)),
        vocab_size=shape.vocab_size,
        max_sequence_length=shape.n_positions,
        position_embedding_type="learned_absolute",
        share_embeddings_and_output_weights=False,
        pg_collection=groups,
    )
    device = next(gpt.parameters()).device
    gpt.output_layer = Score(shape.n_embd, shape.num_labels).to(device)
    weights = whole_weights(reference)
    for name, parameter in gpt.named_parameters():
        whole = weights.pop(name)
        if getattr(parameter, "tensor_model_parallel", False):
            cut = {"rank": groups.tp.rank(), "size": tp, "dim": parameter.partition_dim}
            whole = tp_shard(whole, **cut)
        parameter.data.copy_(whole)
    assert not weights, f"nothing takes {sorted(weights)}"
    return Classifier(gpt)


def whole_weights(reference: Any) -> dict[str, Tensor]:
    """Return Hugging Face's weights under Megatron's names, ``(out, in)``, heads one by one."""
    theirs, shape = reference.state_dict(), reference.config
    found = {name: theirs[other] for name, other in _REST.items()}
    for layer in range(shape.n_layer):
        for name, other in _LAYER.items():
            for kind in ("weight", "bias"):
                value = theirs[f"transformer.h.{layer}.{other}.{kind}"]
                if value.dim() == 2:
                    value = value.t()  # Hugging Face multiplies from the left here
                if name.endswith("linear_qkv"):
                    # All queries, keys and values; Megatron has those of a head together.
                    parts = value.unflatten(0, (3, shape.n_head, -1))
                    value = parts.transpose(0, 1).flatten(0, 2)
                found[f"decoder.layers.{layer}.{name}.{kind}"] = value
    return found


def _config(shape: Any, tp: int) -> TransformerConfig:
    return TransformerConfig(
        num_layers=shape.n_layer,
        hidden_size=shape.n_embd,
        num_attention_heads=shape.n_head,
        ffn_hidden_size=shape.n_inner or 4 * shape.n_embd,
        normalization="LayerNorm",
        layernorm_epsilon=shape.layer_norm_epsilon,
        activation_func=partial(F.gelu, approximate="tanh"),
        add_bias_linear=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=tp,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
    )
