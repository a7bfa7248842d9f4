# SPDX-License-Identifier: Apache-2.0
"""What each way to hold an encoder's activations would save in a job, from its options."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.models.mimo.memory.plan import Step, TransformerShape
from mimo_colocated.launch.training_options import TrainingOptions


@dataclass(frozen=True)
class Encoder:
    """Sizes of an encoder that is a transformer over patches.

    Attributes:
        layers, hidden, heads: of the transformer, whose MLPs are four times as wide.
        tokens: of an item.
        patch: numbers in a patch, which is what becomes a token.
        pooled: tokens that become one row.
        projected: the language model's width.
    """

    layers: int
    hidden: int
    heads: int
    tokens: int
    patch: int
    pooled: int
    projected: int


def encoder_shape(
    encoder: Encoder, tp: int, options: TrainingOptions, *, accelerated: bool
) -> TransformerShape:
    """Return an encoder and its projector as the plan sees them.

    Args:
        encoder: its sizes.
        tp: of its layout.
        options: of the job.
        accelerated: it runs on an accelerator; on the CPU attention with dropout is not fused and
            dropout's masks are numbers.
    """
    itemsize = 4 if options.dtype == "float32" else 2
    return TransformerShape(
        **vars(encoder),
        ffn=4 * encoder.hidden,
        tp=tp,
        itemsize=itemsize,
        dropout=options.dropout > 0,
        recompute=options.recompute,
        attention="fused" if accelerated or not options.dropout else "math",
        mask=1 if accelerated else itemsize,
    )


def step_of(options: TrainingOptions, side: str, frozen: set[str]) -> Step:
    """Return how the job's microbatches go through a step.

    Args:
        options: of the job.
        side: the encoder's name.
        frozen: parts that do not train, by their own names.
    """
    return Step(
        options.micro_batches,
        options.language.pp,
        options.encode_ahead,
        encoder_trains=f"{side}-encoder" not in frozen,
        projector_trains=f"{side}-projector" not in frozen,
    )
