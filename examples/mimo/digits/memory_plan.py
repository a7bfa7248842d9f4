# SPDX-License-Identifier: Apache-2.0
"""``--memory-plan``: what each way to hold the encoders' activations would save in this run."""

from __future__ import annotations

from data import DIGITS_PER_SAMPLE
from images import PATCH_SIDE, TOKENS_PER_IMAGE
from job import model_options
from model import ModelOptions
from options import Options, frozen_parts
from sounds import BANDS, FRAMES, FRAMES_PER_TOKEN

from megatron.core.models.mimo.memory.plan import Step, TransformerShape, transformer_bytes
from megatron.core.models.mimo.memory.table import print_plan


def encoder_shape(
    tp: int, options: ModelOptions, accelerated: bool, side: str = "vision"
) -> TransformerShape:
    """An encoder and projector of the job, as the plan sees them.

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


def items_of_a_microbatch(options: Options, side: str) -> int:
    """Images, or sounds, that one encoder replica encodes at most: with sounds it may be fewer."""
    samples = options.global_batch_size // options.micro_batches
    return samples * DIGITS_PER_SAMPLE // options.pair.encoders[side].dp


def step_of(options: Options, side: str) -> Step:
    """How the run's microbatches go through a step."""
    frozen = frozen_parts(options.freeze)
    return Step(
        options.micro_batches,
        options.language.pp,
        options.encode_ahead,
        encoder_trains=f"{side}-encoder" not in frozen,
        projector_trains=f"{side}-projector" not in frozen,
    )


def print_memory_plan(options: Options, *, accelerated: bool) -> None:
    """A table for one rank with images, and with ``--audio`` another for one with sounds."""
    for side, layout in options.pair.encoders.items():
        if options.audio:
            print(f"\n{side} encoder:")
        shape = encoder_shape(layout.tp, model_options(options), accelerated, side)
        parts = transformer_bytes(shape, items_of_a_microbatch(options, side))
        print_plan(parts, step_of(options, side))
