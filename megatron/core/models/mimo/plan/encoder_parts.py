# SPDX-License-Identifier: Apache-2.0
"""What of a step is an encoder replica's, and what it keeps: ``memory/plan.py`` for a candidate."""

from __future__ import annotations

import math
from dataclasses import replace

from megatron.core.models.mimo.memory.plan import (
    Prediction,
    Step,
    TransformerShape,
    predict,
    transformer_bytes,
)
from megatron.core.models.mimo.plan.candidates import Candidate
from megatron.core.models.mimo.plan.shapes import ENCODER, PROJECTOR, EncoderShape, Shapes, Work
from mimo_colocated.launch.layouts import Layout


def items_per_replica(name: str, candidate: Candidate, shape: EncoderShape, work: Work) -> int:
    """Return items of one microbatch on the encoder replica that has most of them."""
    items = work.items(name, shape) * (work.samples // candidate.microbatches)
    return math.ceil(items / candidate.encoder(name).dp)


def spread(name: str, candidate: Candidate, shape: EncoderShape, work: Work) -> float:
    """Return the most items of an encoder replica over their mean, 1 for equal ones."""
    items = work.items(name, shape) * (work.samples // candidate.microbatches)
    most = items_per_replica(name, candidate, shape, work)
    return most * candidate.encoder(name).dp / items if items else 1.0


def microbatches_kept(candidate: Candidate) -> float:
    """Return microbatches whose layers' activations the first stage holds at a time.

    ``p`` with one forward and one backward pass in turn, more by ``(p - 1) / v`` with ``v``
    virtual stages (Korthikanti et al. 2022, appendix B), never more than there are.

    >>> from mimo_colocated.launch.layouts import Layout
    >>> microbatches_kept(Candidate(Layout(pp=4), {}, 8, virtual_stages=2))
    5.5
    """
    p, v = candidate.language.pp, candidate.virtual_stages
    kept = p + ((p - 1) / v if v > 1 else 0)
    return min(float(candidate.microbatches), kept)


def encoder_prediction(
    name: str, candidate: Candidate, shapes: Shapes, work: Work
) -> Prediction:
    """Return what an encoder and its projector keep on one rank.

    Args:
        name: of the encoder.
        candidate, shapes, work: what runs.
    """
    shape, at = shapes.encoders[name], candidate.encoder(name)
    items = items_per_replica(name, candidate, shape, work)
    parts = transformer_bytes(_transformer(shape, candidate, shapes, work, at), items)
    trains = {f"{part}_trains": work.trains(name, part).any for part in (ENCODER, PROJECTOR)}
    if candidate.homogeneous:
        # The encoder is a part of the first stage, which holds as many microbatches of it.
        kept = math.ceil(microbatches_kept(candidate))
        step = Step(kept, stages=kept, **trains)
    else:
        ahead = candidate.encode_ahead
        step = Step(candidate.microbatches, candidate.language.pp, ahead, **trains)
    return predict(parts, step, candidate.memory)


def computed_again(name: str, candidate: Candidate, shapes: Shapes, work: Work) -> float:
    """Return bytes more while one of an encoder's layers is computed again and goes back.

    By then the projector has gone back, and what it kept is free.
    """
    shape = shapes.encoders[name]
    items = items_per_replica(name, candidate, shape, work)
    own = _transformer(shape, candidate, shapes, work, candidate.encoder(name))
    kept, whole = (
        transformer_bytes(each, items) for each in (own, replace(own, recompute="none"))
    )
    return max(0.0, (whole.encoder - kept.encoder) / own.layers - kept.projector)


def offloaded(name: str, candidate: Candidate, shapes: Shapes, work: Work) -> int:
    """Return bytes that one rank copies to its host and back in a step."""
    return encoder_prediction(name, candidate, shapes, work).moved


def _transformer(
    shape: EncoderShape, candidate: Candidate, shapes: Shapes, work: Work, at: Layout
) -> TransformerShape:
    """The encoder as ``memory/plan.py`` counts it."""
    stack = shape.stack
    # A gated MLP keeps three tensors of its width in place of two.
    ffn = stack.ffn * 3 // 2 if stack.gated else stack.ffn
    pooled = max(1, shape.tokens // shape.rows)
    return TransformerShape(
        layers=stack.layers,
        hidden=stack.hidden,
        ffn=_up(ffn, at.tp),
        heads=stack.heads,
        tokens=_up(shape.tokens, pooled),
        patch=shape.patch,
        projected=_up(shape.projected or shapes.width, at.tp),
        pooled=pooled,
        tp=at.tp,
        cp=at.cp,
        itemsize=work.itemsize,
        recompute=candidate.recompute,
        sequence_parallel=shape.sequence_parallel,
    )


def _up(number: int, factor: int) -> int:
    """The next multiple."""
    return -(-number // factor) * factor
