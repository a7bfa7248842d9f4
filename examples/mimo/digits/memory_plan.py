# SPDX-License-Identifier: Apache-2.0
"""``--memory-plan``: what each way to hold the encoders' activations would save in this run."""

from __future__ import annotations

from examples.mimo.digits.data import DIGITS_PER_SAMPLE
from examples.mimo.digits.images import PATCH_SIDE, TOKENS_PER_IMAGE
from examples.mimo.digits.model import ENCODER_LAYERS, ENCODER_WIDTH, LANGUAGE_WIDTH
from examples.mimo.digits.options import FREEZABLE, HEADS, Options
from examples.mimo.digits.sounds import BANDS, FRAMES, FRAMES_PER_TOKEN
from megatron.core.models.mimo.job.memory_plan import Encoder, encoder_shape, step_of
from megatron.core.models.mimo.memory.plan import transformer_bytes
from megatron.core.models.mimo.memory.table import print_plan

_WIDTHS = (ENCODER_LAYERS, ENCODER_WIDTH, HEADS)
ENCODERS = {
    "vision": Encoder(*_WIDTHS, TOKENS_PER_IMAGE, PATCH_SIDE * PATCH_SIDE, 1, LANGUAGE_WIDTH),
    "audio": Encoder(*_WIDTHS, FRAMES, BANDS, FRAMES_PER_TOKEN, LANGUAGE_WIDTH),
}


def items_of_a_microbatch(options: Options, side: str) -> int:
    """Images, or sounds, that one encoder replica encodes at most: with sounds it may be fewer."""
    samples = options.global_batch_size // options.micro_batches
    return samples * DIGITS_PER_SAMPLE // options.encoders[side].dp


def print_memory_plan(options: Options, *, accelerated: bool) -> None:
    """A table for one rank with images, and with ``--audio`` another for one with sounds."""
    for side, layout in options.encoders.items():
        if options.audio:
            print(f"\n{side} encoder:")
        shape = encoder_shape(ENCODERS[side], layout.tp, options, accelerated=accelerated)
        parts = transformer_bytes(shape, items_of_a_microbatch(options, side))
        print_plan(parts, step_of(options, side, FREEZABLE.each(options.freeze)))
