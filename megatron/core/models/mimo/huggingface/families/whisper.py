# SPDX-License-Identifier: Apache-2.0
"""Whisper's encoder, alone and within Qwen2-Audio."""

from __future__ import annotations

from typing import Any

from megatron.core.models.mimo.huggingface.cuts import QKV, QV, Along, Whole
from megatron.core.models.mimo.huggingface.family import activation, renamed
from megatron.core.models.mimo.huggingface.tables import Table, line

_COMMON = {
    "num_layers": "encoder_layers",
    "hidden_size": "d_model",
    "num_attention_heads": "encoder_attention_heads",
    "ffn_hidden_size": "encoder_ffn_dim",
    "attention_dropout": "attention_dropout",
    "hidden_dropout": "dropout",
}
READ = frozenset({*_COMMON.values(), "activation_function", "num_mel_bins", "max_source_positions"})
"""Fields of the configuration that :func:`settings` and the tower read."""
REFUSED = {
    "encoder_layerdrop": lambda c: "layers left out at random" if c.encoder_layerdrop else None,
    "activation_dropout": lambda c: "dropout within the MLP" if c.activation_dropout else None,
}
"""Fields that would change training, and why they are refused."""
UNUSED_FIELDS = frozenset({"scale_embedding"})
"""Fields that transformers' encoder does not use either."""


def settings(config: Any) -> dict[str, Any]:
    """Return the fields of the encoder's ``TransformerConfig``."""
    return {
        **renamed(config, _COMMON),
        "activation_func": activation(config.activation_function),
        "normalization": "LayerNorm",
        "layernorm_epsilon": 1e-5,
        "add_bias_linear": True,
    }


def table(ours: str, theirs: str) -> Table:
    """Return the table of the encoder.

    Args:
        ours: prefix of its names here.
        theirs: prefix of its names in a folder.
    """
    lines = []
    for kind in ("weight", "bias"):
        for name in ("conv1", "conv2", "layer_norm"):
            lines.append(line(f"{ours}{name}.{kind}", f"{theirs}{name}.{kind}", Whole()))
    layer = f"{theirs}layers.{{}}."
    lines += [
        line(
            f"{ours}transformer.blocks.0.layers.{{}}.{name}", [layer + each for each in names], cut
        )
        for name, (names, cut) in _layer().items()
    ]
    positions = line(f"{ours}position_embedding", f"{theirs}embed_positions.weight", Whole())
    return Table((*lines, positions))


def _layer() -> dict[str, tuple[list[str], Any]]:
    """Our name in a layer -> theirs, and the cut."""
    attention = "self_attn."
    joined = [f"{attention}{name}_proj.weight" for name in "qkv"]
    lines: dict[str, tuple[list[str], Any]] = {
        "self_attention.linear_qkv.weight": (joined, QKV()),
        "self_attention.linear_qkv.bias": ([f"{attention}{n}_proj.bias" for n in "qv"], QV()),
        "self_attention.linear_proj.weight": ([f"{attention}out_proj.weight"], Along(1)),
        "self_attention.linear_proj.bias": ([f"{attention}out_proj.bias"], Whole()),
        "mlp.linear_fc1.weight": (["fc1.weight"], Along(0)),
        "mlp.linear_fc1.bias": (["fc1.bias"], Along(0)),
        "mlp.linear_fc2.weight": (["fc2.weight"], Along(1)),
        "mlp.linear_fc2.bias": (["fc2.bias"], Whole()),
    }
    for kind in ("weight", "bias"):
        # A norm of its own, or the one within Transformer Engine's layers.
        for name in ("input_layernorm.", "self_attention.linear_qkv.layer_norm_"):
            lines[name + kind] = ([f"self_attn_layer_norm.{kind}"], Whole())
        for name in ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"):
            lines[name + kind] = ([f"final_layer_norm.{kind}"], Whole())
    return lines
