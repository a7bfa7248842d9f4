# SPDX-License-Identifier: Apache-2.0
"""The towers of CLIP and SigLIP; transformers has no plan for them.

Patches, positions and pooling are computed whole on each rank; the encoder's layers are split.
"""

from __future__ import annotations

from dataclasses import replace

from megatron.core.models.mimo.torch_native.plans.plan import Plan, Style

_LAYER = "encoder.layers.*."
SIGLIP = Plan(
    styles={
        "embeddings": Style.REPLICATED,
        "encoder": Style.CUT_AND_JOIN,
        _LAYER + "layer_norm1": Style.SEQUENCE,
        _LAYER + "self_attn": Style.WHOLE_SEQUENCE,
        _LAYER + "self_attn.q_proj": Style.COLUMN,
        _LAYER + "self_attn.k_proj": Style.COLUMN,
        _LAYER + "self_attn.v_proj": Style.COLUMN,
        _LAYER + "self_attn.out_proj": Style.ROW,
        _LAYER + "layer_norm2": Style.SEQUENCE,
        _LAYER + "mlp": Style.WHOLE_SEQUENCE,
        _LAYER + "mlp.fc1": Style.COLUMN,
        _LAYER + "mlp.fc2": Style.ROW,
        "post_layernorm": Style.REPLICATED,
        "head": Style.REPLICATED,
    },
    blocks="encoder.layers.*",
    optional=frozenset({"head"}),
)
CLIP = replace(
    SIGLIP,
    styles={
        **{name: style for name, style in SIGLIP.styles.items() if name != "head"},
        "pre_layrnorm": Style.REPLICATED,
    },
    outer={"visual_projection": Style.REPLICATED},
    optional=frozenset({"visual_projection"}),
)
