# SPDX-License-Identifier: Apache-2.0
"""Plans of families, by ``model_type`` of transformers' configuration."""

from __future__ import annotations

from typing import Any

from megatron.core.models.mimo.torch_native.plans import llama, qwen2, qwen3, vision_towers
from megatron.core.models.mimo.torch_native.plans.plan import Plan, Style, matching

__all__ = ["PLANS", "Plan", "Style", "matching", "plan_of"]

PLANS: dict[str, Plan] = {
    "llama": llama.PLAN,
    "qwen2": qwen2.PLAN,
    "qwen3": qwen3.PLAN,
    "clip_vision_model": vision_towers.CLIP,
    "siglip_vision_model": vision_towers.SIGLIP,
}

_TEMPLATE = """from megatron.core.models.mimo.torch_native import parallelize
from megatron.core.models.mimo.torch_native.plans import Plan, Style

plan = Plan(
    styles={
        "": Style.CUT,
        "embed_tokens": Style.VOCABULARY,
        "layers.*.input_layernorm": Style.SEQUENCE,
        "layers.*.self_attn": Style.WHOLE_SEQUENCE,
        "layers.*.self_attn.q_proj": Style.COLUMN,  # and so k_proj, v_proj
        "layers.*.self_attn.o_proj": Style.ROW,
        # ... every module that has parameters
    },
    blocks="layers.*",
    divisible=("num_attention_heads", "num_key_value_heads", "intermediate_size"),
    outer={"lm_head": Style.LOGITS},
)
parallelize(model, grid, plan=plan)"""


def plan_of(config: Any) -> Plan:
    """Return the plan of a model's family.

    Args:
        config: transformers' configuration of the model.

    Raises:
        ValueError: the family has none; the message has a template of one.
    """
    kind = getattr(config, "model_type", None)
    if kind in PLANS:
        return PLANS[kind]
    raise ValueError(
        f"no plan for model_type {kind!r}; there are plans for {sorted(PLANS)}. Write one, with a "
        f"style for every module that has parameters:\n\n{_TEMPLATE}"
    )
