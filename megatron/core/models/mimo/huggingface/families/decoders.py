# SPDX-License-Identifier: Apache-2.0
"""Language models: Llama, Mistral, Qwen2, Qwen3, Qwen3-MoE, Mixtral and GPT-2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron.core.models.mimo.huggingface.cuts import (
    QKV,
    Along,
    FusedQKV,
    Gated,
    Vocabulary,
    Whole,
)
from megatron.core.models.mimo.huggingface.family import Family, activation, renamed
from megatron.core.models.mimo.huggingface.rotary import rotary_of
from megatron.core.models.mimo.huggingface.tables import Table, line

_OUR_LAYER = "decoder.layers.{}."
_EXPERT = "mlp.experts.local_experts.{}."
_COMMON = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "ffn_hidden_size": "intermediate_size",
    "layernorm_epsilon": "rms_norm_eps",
    "attention_dropout": "attention_dropout",
}
_READ = frozenset(
    {*_COMMON.values(), "head_dim", "hidden_act", "rope_parameters", "vocab_size"}
    | {"max_position_embeddings", "tie_word_embeddings"}
)


def _layers(prefix: str, lines: Mapping[str, tuple[Any, Any]]) -> Table:
    """Lines of a layer: our name -> (their name or names, cut)."""
    made = []
    for ours, (theirs, cut) in lines.items():
        names = (theirs,) if isinstance(theirs, str) else theirs
        made.append(line(_OUR_LAYER + ours, [prefix + name for name in names], cut))
    return Table(tuple(made))


def _norms(ours: tuple[str, ...], theirs: str, *kinds: str) -> dict[str, tuple[str, Whole]]:
    """A norm under its names here: its own, and the one that Transformer Engine's layers have."""
    return {f"{name}{kind}": (f"{theirs}.{kind}", Whole()) for name in ours for kind in kinds}


_PRE_ATTENTION = ("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
_PRE_MLP = ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")
_QKV_NAMES = ("q_proj", "k_proj", "v_proj")


def _llama_table(config: Any) -> Table:
    """Llama's names, which Mistral, Qwen2, Qwen3 and their experts share."""
    attention = "self_attn."
    lines = {
        **_norms(_PRE_ATTENTION, "input_layernorm", "weight"),
        **_norms(_PRE_MLP, "post_attention_layernorm", "weight"),
        "self_attention.q_layernorm.weight": (attention + "q_norm.weight", Whole()),
        "self_attention.k_layernorm.weight": (attention + "k_norm.weight", Whole()),
        "self_attention.linear_proj.weight": (attention + "o_proj.weight", Along(1)),
        "self_attention.linear_proj.bias": (attention + "o_proj.bias", Whole()),
        "mlp.linear_fc2.weight": ("mlp.down_proj.weight", Along(1)),
        "mlp.linear_fc2.bias": ("mlp.down_proj.bias", Whole()),
    }
    for kind in ("weight", "bias"):
        projections = tuple(f"{attention}{name}.{kind}" for name in _QKV_NAMES)
        lines[f"self_attention.linear_qkv.{kind}"] = (projections, QKV())
        gated = (f"mlp.gate_proj.{kind}", f"mlp.up_proj.{kind}")
        lines[f"mlp.linear_fc1.{kind}"] = (gated, Gated())
    table = _layers("model.layers.{}.", lines)
    unused = ("model.layers.{}.self_attn.rotary_emb.inv_freq",)
    return table + _ends(config) + Table((), unused)


def _ends(config: Any) -> Table:
    """Embedding, last norm, output layer; a tied one is the embedding."""
    embedding = "model.embed_tokens.weight"
    output = embedding if config.tie_word_embeddings else "lm_head.weight"
    return Table(
        (
            line("embedding.word_embeddings.weight", embedding, Vocabulary()),
            line("decoder.final_layernorm.weight", "model.norm.weight", Whole()),
            line("output_layer.weight", output, Vocabulary()),
        ),
        # Some folders store a tied output layer once more.
        repeated=(("lm_head.weight", embedding),) if config.tie_word_embeddings else (),
    )


def _expert_table(config: Any, block: str, gate: str, up: str, down: str) -> Table:
    """Experts beside :func:`_llama_table`, under a family's names."""
    lines = {
        "mlp.router.weight": (f"{block}.gate.weight", Whole()),
        f"{_EXPERT}linear_fc1.weight": (
            (f"{block}.experts.{{}}.{gate}.weight", f"{block}.experts.{{}}.{up}.weight"),
            Gated(),
        ),
        f"{_EXPERT}linear_fc2.weight": (f"{block}.experts.{{}}.{down}.weight", Along(1)),
    }
    return _layers("model.layers.{}.", lines) + _llama_table(config)


def _qwen_expert_table(config: Any) -> Table:
    return _expert_table(config, "mlp", "gate_proj", "up_proj", "down_proj")


def _mixtral_table(config: Any) -> Table:
    return _expert_table(config, "block_sparse_moe", "w1", "w3", "w2")


def _llama_settings(config: Any) -> dict[str, Any]:
    head = getattr(config, "head_dim", None)
    return {
        **renamed(config, _COMMON),
        "kv_channels": head or config.hidden_size // config.num_attention_heads,
        "activation_func": activation(config.hidden_act),
        "gated_linear_unit": True,
        "normalization": "RMSNorm",
        "hidden_dropout": 0.0,
        "add_bias_linear": bool(getattr(config, "mlp_bias", False)),
    }


def _qwen2_settings(config: Any) -> dict[str, Any]:
    return {**_llama_settings(config), "add_qkv_bias": True}


def _qwen3_settings(config: Any) -> dict[str, Any]:
    return {**_llama_settings(config), "qk_layernorm": True}


def _expert_settings(config: Any, normalised: bool) -> dict[str, Any]:
    return {
        "num_moe_experts": config.num_local_experts,
        "moe_router_topk": config.num_experts_per_tok,
        # Chosen scores that are normalised are a softmax over the chosen ones.
        "moe_router_pre_softmax": not normalised,
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
    }


def _qwen3_moe_settings(config: Any) -> dict[str, Any]:
    dense = set(config.mlp_only_layers)
    layers = range(config.num_hidden_layers)
    step = config.decoder_sparse_step
    return {
        **_qwen3_settings(config),
        **_expert_settings(config, config.norm_topk_prob),
        "moe_ffn_hidden_size": config.moe_intermediate_size,
        "moe_layer_freq": [int(n not in dense and (n + 1) % step == 0) for n in layers],
    }


def _mixtral_settings(config: Any) -> dict[str, Any]:
    return {
        **_llama_settings(config),
        **_expert_settings(config, normalised=True),
        "moe_ffn_hidden_size": config.intermediate_size,
    }


def _rope_params(config: Any) -> dict[str, Any]:
    width = _llama_settings(config)["kv_channels"]
    rotary = rotary_of(config, width)
    return {
        "rotary": rotary,
        "position_embedding_type": "rope" if rotary.sections is None else "mrope",
        "real_vocab_size": config.vocab_size,
        "vocab_size": Vocabulary().padded(config.vocab_size),
        "max_sequence_length": config.max_position_embeddings,
        "share_embeddings_and_output_weights": config.tie_word_embeddings,
    }


def _biases(config: Any) -> str | None:
    """Megatron's linear layers have biases all together; the query, key and value ones aside."""
    if bool(config.attention_bias) == bool(getattr(config, "mlp_bias", False)):
        return None
    return "biases of the attention's or of the MLP's linear layers alone"


_LLAMA = Family(
    model_types=("llama",),
    settings=_llama_settings,
    params=_rope_params,
    table=_llama_table,
    reads=_READ,
    refuses={
        "attention_bias": _biases,
        "mlp_bias": _biases,
    },
)


def _sliding(config: Any) -> str | None:
    if config.sliding_window is None:
        return None
    return (
        f"attention within a window of {config.sliding_window} tokens; for shorter sequences set "
        f'"sliding_window": null in config.json, which is the same function there'
    )


# A window that is set and not used; layer types follow from both.
_WINDOWS = frozenset({"use_sliding_window", "layer_types"})
_MISTRAL = replace(_LLAMA, model_types=("mistral",), refuses={"sliding_window": _sliding})
_QWEN2 = replace(
    _MISTRAL, model_types=("qwen2", "qwen2_5_vl_text"), settings=_qwen2_settings, ignores=_WINDOWS
)
_QWEN3 = replace(
    _QWEN2,
    model_types=("qwen3", "qwen3_vl_text"),
    settings=_qwen3_settings,
    refuses={**_QWEN2.refuses, "attention_bias": _biases},
)
_EXPERT_FIELDS = frozenset({"num_local_experts", "num_experts_per_tok", "router_aux_loss_coef"})
_QWEN3_MOE = replace(
    _QWEN3,
    model_types=("qwen3_moe",),
    settings=_qwen3_moe_settings,
    table=_qwen_expert_table,
    reads=_READ
    | _EXPERT_FIELDS
    | {"moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers"},
)
_MIXTRAL = replace(
    _MISTRAL,
    model_types=("mixtral",),
    settings=_mixtral_settings,
    table=_mixtral_table,
    reads=_READ | _EXPERT_FIELDS,
)

_GPT2_COMMON = {
    "num_layers": "n_layer",
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "layernorm_epsilon": "layer_norm_epsilon",
    "attention_dropout": "attn_pdrop",
    "hidden_dropout": "resid_pdrop",
}


def _gpt2_settings(config: Any) -> dict[str, Any]:
    return {
        **renamed(config, _GPT2_COMMON),
        "ffn_hidden_size": config.n_inner or 4 * config.n_embd,
        "activation_func": activation(config.activation_function),
        "normalization": "LayerNorm",
        "add_bias_linear": True,
    }


def _gpt2_params(config: Any) -> dict[str, Any]:
    return {
        "position_embedding_type": "learned_absolute",
        "real_vocab_size": config.vocab_size,
        "vocab_size": Vocabulary().padded(config.vocab_size),
        "max_sequence_length": config.n_positions,
        "share_embeddings_and_output_weights": config.tie_word_embeddings,
    }


def _gpt2_table(config: Any) -> Table:
    output = "transformer.wte.weight" if config.tie_word_embeddings else "lm_head.weight"
    layers = {
        **_norms(_PRE_ATTENTION, "ln_1", "weight", "bias"),
        **_norms(_PRE_MLP, "ln_2", "weight", "bias"),
        "self_attention.linear_qkv.weight": ("attn.c_attn.weight", FusedQKV(transposed=True)),
        "self_attention.linear_qkv.bias": ("attn.c_attn.bias", FusedQKV()),
        "self_attention.linear_proj.weight": ("attn.c_proj.weight", Along(1, transposed=True)),
        "self_attention.linear_proj.bias": ("attn.c_proj.bias", Whole()),
        "mlp.linear_fc1.weight": ("mlp.c_fc.weight", Along(0, transposed=True)),
        "mlp.linear_fc1.bias": ("mlp.c_fc.bias", Along(0)),
        "mlp.linear_fc2.weight": ("mlp.c_proj.weight", Along(1, transposed=True)),
        "mlp.linear_fc2.bias": ("mlp.c_proj.bias", Whole()),
    }
    ends = (
        line("embedding.word_embeddings.weight", "transformer.wte.weight", Vocabulary()),
        line("embedding.position_embeddings.weight", "transformer.wpe.weight", Whole()),
        line("decoder.final_layernorm.weight", "transformer.ln_f.weight", Whole()),
        line("decoder.final_layernorm.bias", "transformer.ln_f.bias", Whole()),
        line("output_layer.weight", output, Vocabulary()),
    )
    # Causal masks that older folders store as buffers.
    unused = ("transformer.h.{}.attn.bias", "transformer.h.{}.attn.masked_bias")
    tied = (("lm_head.weight", output),) if config.tie_word_embeddings else ()
    return _layers("transformer.h.{}.", layers) + Table(ends, unused, tied)


_GPT2 = Family(
    model_types=("gpt2",),
    settings=_gpt2_settings,
    params=_gpt2_params,
    table=_gpt2_table,
    reads=frozenset(
        {*_GPT2_COMMON.values(), "n_inner", "activation_function", "vocab_size", "n_positions"}
        | {"tie_word_embeddings"}
    ),
    ignores=frozenset(
        [
            "summary_activation",
            "summary_first_dropout",
            "summary_proj_to_labels",
            "summary_type",
            "summary_use_proj",
            "reorder_and_upcast_attn",
        ]
    ),
    refuses={
        "embd_pdrop": lambda config: (
            None
            if config.embd_pdrop == config.resid_pdrop
            else f"another dropout than resid_pdrop, {config.resid_pdrop}; make them equal"
        ),
        "scale_attn_by_inverse_layer_idx": lambda config: (
            "attention scaled by layer" if config.scale_attn_by_inverse_layer_idx else None
        ),
        "scale_attn_weights": lambda config: (
            None if config.scale_attn_weights else "attention that is not scaled"
        ),
        "add_cross_attention": lambda config: (
            "cross attention" if config.add_cross_attention else None
        ),
    },
)

DECODERS = (_LLAMA, _MISTRAL, _QWEN2, _QWEN3, _QWEN3_MOE, _MIXTRAL, _GPT2)
"""Families of language models."""
