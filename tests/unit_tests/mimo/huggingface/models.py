# SPDX-License-Identifier: Apache-2.0
"""Tiny language models of transformers' own classes; sizes that hide no mistake.

Heads are not ``hidden / heads`` wide where the family allows it, there are fewer key/value heads
than heads, the vocabulary is no multiple of what it is padded to.
"""

from __future__ import annotations

from collections.abc import Callable

import transformers
from torch import nn

VOCABULARY = 99
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


def _causal(name: str, **settings: object) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        config = getattr(transformers, f"{name}Config")(**settings)
        made = getattr(transformers, f"{name}ForCausalLM", None)
        return (made or transformers.GPT2LMHeadModel)(config)

    return make


DENSE = {
    "llama": _causal("Llama", **SIZES),
    "llama3": _causal("Llama", **SIZES, rope_parameters=LLAMA3, tie_word_embeddings=True),
    "llama-biased": _causal("Llama", **SIZES, attention_bias=True, mlp_bias=True),
    "mistral": _causal("Mistral", **SIZES, sliding_window=None, head_dim=16),
    "qwen2": _causal("Qwen2", **SIZES),
    "qwen2-tied": _causal("Qwen2", **SIZES, tie_word_embeddings=True),
    "qwen3": _causal("Qwen3", **SIZES, head_dim=16),
    "gpt2": _causal(
        "GPT2",
        n_embd=32,
        n_layer=2,
        n_head=8,
        n_inner=48,
        vocab_size=VOCABULARY,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
        resid_pdrop=0.0,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
    ),
}
"""Name -> makes a dense language model."""
SPARSE = {
    "qwen3_moe": _causal("Qwen3Moe", **SIZES, head_dim=16, moe_intermediate_size=24, **EXPERTS),
    "qwen3_moe-normalised": _causal(
        "Qwen3Moe",
        **{**SIZES, "num_hidden_layers": 4},
        head_dim=16,
        moe_intermediate_size=24,
        norm_topk_prob=True,
        mlp_only_layers=[1],
        decoder_sparse_step=2,
        **EXPERTS,
    ),
    "mixtral": _causal("Mixtral", **SIZES, **EXPERTS),
}
"""Name -> makes a language model with experts."""
