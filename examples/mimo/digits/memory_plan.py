# SPDX-License-Identifier: Apache-2.0
"""``--memory-plan``: what each way to hold the encoders' activations would save, and its sizes."""

from __future__ import annotations

from dataclasses import replace

from examples.mimo.digits.data import DIGITS_PER_SAMPLE, SEQUENCE_LENGTH, VOCABULARY_SIZE
from examples.mimo.digits.images import PATCH_SIDE, TOKENS_PER_IMAGE
from examples.mimo.digits.model import ENCODER_LAYERS, ENCODER_WIDTH, LANGUAGE_WIDTH
from examples.mimo.digits.options import FREEZABLE, HEADS, Options
from examples.mimo.digits.sounds import BANDS, FRAMES, FRAMES_PER_TOKEN
from megatron.core.models.mimo.job.memory_plan import Encoder, encoder_shape, step_of
from megatron.core.models.mimo.memory.plan import transformer_bytes
from megatron.core.models.mimo.memory.table import print_plan
from megatron.core.models.mimo.plan.shapes import EncoderShape, LanguageShape, Shapes, Stack, Work

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


def planned(options: Options) -> tuple[Shapes, Work]:
    """Return the model and a step of it as the planner sees them, for ``mimo train --dry-run``."""
    layers, inner, experts = options.language_layers, 2 * LANGUAGE_WIDTH, options.experts
    language = Stack.of(layers, LANGUAGE_WIDTH, inner, HEADS, gated=True)
    if experts:
        shape = {"experts": experts, "chosen": min(2, experts), "expert_ffn": inner}
        language = replace(language, **shape, expert_layers=layers)
    encoders = {
        side: EncoderShape(
            Stack.of(ENCODER_LAYERS, ENCODER_WIDTH, 4 * ENCODER_WIDTH, HEADS),
            kind.tokens,
            kind.tokens // kind.pooled,
            kind.patch,
            ENCODER_WIDTH,
            LANGUAGE_WIDTH,
        )
        for side, kind in ENCODERS.items()
        if side in options.encoders
    }
    # Every digit of a sample is an image, or a sound.
    rows = DIGITS_PER_SAMPLE * TOKENS_PER_IMAGE / SEQUENCE_LENGTH / len(encoders)
    work = Work(
        SEQUENCE_LENGTH,
        options.global_batch_size,
        dict.fromkeys(encoders, rows),
        itemsize=4 if options.dtype == "float32" else 2,
    )
    return Shapes(LanguageShape(language, VOCABULARY_SIZE), encoders), work
