# SPDX-License-Identifier: Apache-2.0
"""The encoders of the proof models, as the memory plan sees them."""

from __future__ import annotations

from examples.mimo.digits.images import PATCH_SIDE, TOKENS_PER_IMAGE
from examples.mimo.digits.sounds import BANDS, FRAMES, FRAMES_PER_TOKEN
from megatron.core.models.mimo.memory.plan import TransformerShape
from tests.models.model import ModelOptions


def encoder_shape(
    tp: int, options: ModelOptions, accelerated: bool, side: str = "vision"
) -> TransformerShape:
    """An encoder and projector, as the plan sees them.

    Args:
        tp: of the encoder.
        options: of the model.
        accelerated: it runs on an accelerator; on the CPU attention with dropout is not fused and
            dropout's masks are numbers.
        side: ``"vision"`` or ``"audio"``.
    """
    tokens, patch, pooled = {
        "vision": (TOKENS_PER_IMAGE, PATCH_SIDE * PATCH_SIDE, 1),
        "audio": (FRAMES, BANDS, FRAMES_PER_TOKEN),
    }[side]
    size, dropout, itemsize = options.size, options.dropout > 0, options.dtype.itemsize
    return TransformerShape(
        layers=getattr(size, f"{side}_layers"),
        hidden=getattr(size, f"{side}_hidden"),
        ffn=4 * getattr(size, f"{side}_hidden"),
        heads=getattr(size, f"{side}_heads"),
        tokens=tokens,
        patch=patch,
        pooled=pooled,
        projected=size.language_hidden,
        tp=tp,
        itemsize=itemsize,
        dropout=dropout,
        recompute=options.recompute,
        attention="fused" if accelerated or not dropout else "math",
        mask=1 if accelerated else itemsize,
    )
