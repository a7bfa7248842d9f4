# SPDX-License-Identifier: Apache-2.0
"""``--memory-plan``: what each way to hold the encoder's activations would save in this run."""

from __future__ import annotations

from data import IMAGES_PER_SAMPLE, TOKENS_PER_IMAGE
from job import model_options
from model import PATCH_PIXELS, ModelOptions
from options import Options, parts_to_freeze

from megatron.core.models.mimo.memory.plan import Step, TransformerShape, transformer_bytes
from megatron.core.models.mimo.memory.table import print_plan


def encoder_shape(tp: int, options: ModelOptions, accelerated: bool) -> TransformerShape:
    """The encoder and projector of the job, as the plan sees them.

    Args:
        tp: of the encoder.
        options: of the model.
        accelerated: it runs on an accelerator; on the CPU attention with dropout is not fused and
            dropout's masks are numbers.
    """
    size, dropout, itemsize = options.size, options.dropout > 0, options.dtype.itemsize
    return TransformerShape(
        layers=size.vision_layers,
        hidden=size.vision_hidden,
        ffn=4 * size.vision_hidden,
        heads=size.vision_heads,
        tokens=TOKENS_PER_IMAGE,
        patch=PATCH_PIXELS,
        projected=size.language_hidden,
        tp=tp,
        itemsize=itemsize,
        dropout=dropout,
        recompute=options.recompute,
        attention="fused" if accelerated or not dropout else "math",
        mask=1 if accelerated else itemsize,
    )


def images_of_a_microbatch(options: Options) -> int:
    """Those that one encoder replica encodes."""
    samples = options.global_batch_size // options.micro_batches
    return samples * IMAGES_PER_SAMPLE // options.vision.dp


def step_of(options: Options) -> Step:
    """How the run's microbatches go through a step."""
    frozen = parts_to_freeze(options.freeze)
    return Step(
        options.micro_batches,
        options.language.pp,
        options.encode_ahead,
        encoder_trains="encoder" not in frozen,
        projector_trains="projector" not in frozen,
    )


def print_memory_plan(options: Options, *, accelerated: bool) -> None:
    """The table of one rank with images."""
    shape = encoder_shape(options.vision.tp, model_options(options), accelerated)
    print_plan(transformer_bytes(shape, images_of_a_microbatch(options)), step_of(options))
