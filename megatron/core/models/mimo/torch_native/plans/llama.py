# SPDX-License-Identifier: Apache-2.0
"""Llama's plan, whose names Qwen2 and Qwen3 share.

transformers' own ``base_model_tp_plan`` says the same of the seven Linears. It says nothing of
the embedding (every rank would hold all of it), nothing of the norms (they would run on the whole
sequence), and its ``lm_head`` gathers the logits.
"""

from __future__ import annotations

from megatron.core.models.mimo.torch_native.plans.plan import Plan, Style

PLAN = Plan(
    styles={
        "": Style.CUT,
        "embed_tokens": Style.VOCABULARY,
        "layers.*.input_layernorm": Style.SEQUENCE,
        "layers.*.self_attn": Style.WHOLE_SEQUENCE,
        "layers.*.self_attn.q_proj": Style.COLUMN,
        "layers.*.self_attn.k_proj": Style.COLUMN,
        "layers.*.self_attn.v_proj": Style.COLUMN,
        "layers.*.self_attn.o_proj": Style.ROW,
        "layers.*.post_attention_layernorm": Style.SEQUENCE,
        "layers.*.mlp": Style.WHOLE_SEQUENCE,
        "layers.*.mlp.gate_proj": Style.COLUMN,
        "layers.*.mlp.up_proj": Style.COLUMN,
        "layers.*.mlp.down_proj": Style.ROW,
        "norm": Style.SEQUENCE,
    },
    blocks="layers.*",
    divisible=("num_attention_heads", "num_key_value_heads", "intermediate_size"),
    outer={"lm_head": Style.LOGITS},
)
