# SPDX-License-Identifier: Apache-2.0
"""What each memory policy will save, before anything runs. Pure integers.

Two ways to the bytes that one microbatch keeps on one rank, both as :class:`PartBytes`:
:func:`transformer_bytes`, a formula for Megatron-Core's transformer layers as this project builds
them without Transformer Engine; and ``memory.kept.part_bytes``, which runs any modality once and
counts. What follows from them is the same: :func:`plan`.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from fractions import Fraction

from megatron.core.models.mimo.memory.policy import KEEP, OFFLOAD, RECOMPUTE, EncoderMemory

LAYER_RECOMPUTE = ("none", "selective", "full")
ATTENTIONS = ("fused", "math")


@dataclass(frozen=True)
class PartBytes:
    """Bytes of one microbatch on one rank.

    Attributes:
        inputs: what the encoders are called with.
        encoder: what autograd keeps for their backward pass; 0 if they are frozen.
        rows: the encoders' output.
        projector: what autograd keeps for the projection's backward pass, ``rows`` among it.
        encoder_flops, projector_flops: of one forward pass, on any scale; 0 if unknown.
    """

    inputs: int
    encoder: int
    rows: int
    projector: int
    encoder_flops: int = 0
    projector_flops: int = 0


@dataclass(frozen=True)
class TransformerShape:
    """A transformer encoder with an MLP projection, on one rank.

    Attributes:
        layers, hidden, ffn, heads: of the whole encoder.
        tokens: of one item (the patches of an image).
        patch: numbers of one token that the embedding reads.
        pooled: tokens of which the encoder returns the mean, as one row.
        projected: width of the projection's hidden layer and of its output.
        tp: ranks that share the encoder and the projection.
        itemsize: bytes of a number.
        dropout: of hidden states and of attention.
        recompute: what Megatron-Core computes again: ``"none"``, attention (``"selective"``), or
            whole layers (``"full"``).
        attention: ``"fused"``, or ``"math"``, which keeps every weight: what PyTorch does on the
            CPU with dropout.
        mask: bytes of a dropout mask's element: 1 on accelerators, a number on the CPU.
        input_itemsize: bytes of a number of the encoder's inputs.
        sequence_parallel: the ranks that share the encoder also cut what its norms keep.
        cp: ranks that have a part of each item's tokens; its embedding is whole on all of them.

    Raises:
        ValueError: an unknown name, or a size that is not positive or does not divide.
    """

    layers: int
    hidden: int
    ffn: int
    heads: int
    tokens: int
    patch: int
    projected: int
    pooled: int = 1
    tp: int = 1
    itemsize: int = 2
    dropout: bool = False
    recompute: str = "none"
    attention: str = "fused"
    mask: int = 1
    input_itemsize: int = 4
    sequence_parallel: bool = False
    cp: int = 1

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "ffn", "heads", "tokens", "patch", "projected",
                     "pooled", "tp", "cp", "itemsize", "mask", "input_itemsize"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        for name in ("heads", "ffn", "projected"):
            if getattr(self, name) % self.tp:
                raise ValueError(f"tp={self.tp} must divide {name}={getattr(self, name)}")
        if self.cp > 1 and (self.pooled > 1 or self.heads % (self.tp * self.cp)):
            raise ValueError(
                f"cp={self.cp} takes heads={self.heads} that tp={self.tp} * cp divides, and "
                f"pooled=1, got {self.pooled}"
            )
        if self.tokens % self.pooled:
            raise ValueError(f"pooled={self.pooled} must divide tokens={self.tokens}")
        if self.recompute not in LAYER_RECOMPUTE:
            raise ValueError(f"recompute must be one of {LAYER_RECOMPUTE}, got {self.recompute!r}")
        if self.attention not in ATTENTIONS:
            raise ValueError(f"attention must be one of {ATTENTIONS}, got {self.attention!r}")


def transformer_bytes(shape: TransformerShape, items: int) -> PartBytes:
    """Return what ``items`` items keep, counted tensor by tensor.

    After Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models",
    whose layer keeps ``sbh (34 + 5 a s / h)`` bytes in 16 bits with dropout. With ``e`` bytes a
    number, ``m`` of a mask's element and TP ``t``, a layer here keeps per token, of width ``h``:

    ==============================  ===============================================
    inputs of both norms            ``2 e h``
    outputs of both norms           ``2 e h`` (inputs of column-parallel layers)
    mean and deviation of both      ``4 e``
    query, key, value               ``3 e h / t``
    attention, fused                its output ``e h / t``, a float per head ``4 a / t``
    attention, math (with dropout)  ``3 * 4 a s / t``, and scaled query and key, ``2 * 4 h / t``;
                                    in 16 bits ``4 h / t`` in place of query, key, value
    input of the output projection  ``e h / t``
    MLP, before and after gelu      ``2 e f / t``
    both hidden dropouts            ``2 m h``, with dropout
    ==============================  ===============================================

    With sequence parallelism the rows of the table without ``t`` are over ``t``, too. With CP a
    rank has its part of the tokens, and all-to-alls around attention keep nothing.

    ``"selective"`` keeps no more of attention than query, key and value, ``"full"`` of a layer only
    its input. The embedding keeps its input; the last norm its input, mean and deviation; the
    projection its input, and its hidden layer before and after gelu.

    >>> shape = TransformerShape(2, 64, 256, 8, tokens=4, patch=16, projected=128, itemsize=4)
    >>> transformer_bytes(shape, 100).projector == 400 * 4 * (64 + 2 * 128)
    True
    """
    e, h, whole = shape.itemsize, shape.hidden, items * shape.tokens
    # Of the CP rank with most of each item.
    tokens = items * -(-shape.tokens // shape.cp)
    norm = e * h + 2 * e
    cut = shape.tp if shape.sequence_parallel else 1
    layers = shape.layers * (e * h // cut if shape.recompute == "full" else _layer(shape))
    pooled = tokens // shape.pooled
    rows = pooled * e * h
    return PartBytes(
        inputs=whole * shape.patch * shape.input_itemsize,
        encoder=whole * e * shape.patch + tokens * (layers + norm),
        rows=rows,
        projector=rows + pooled * 2 * e * shape.projected // shape.tp,
        encoder_flops=tokens * _encoder_flops(shape) // shape.tp,
        projector_flops=pooled * 2 * shape.projected * (h + shape.projected) // shape.tp,
    )


def _layer(shape: TransformerShape) -> int:
    """Bytes that a layer keeps per token."""
    e, h, tp = shape.itemsize, shape.hidden, shape.tp
    norms = 4 * e * h + 4 * e
    masks = 2 * shape.mask * h if shape.dropout else 0
    between = (norms + masks) // tp if shape.sequence_parallel else norms + masks
    mlp = 2 * e * shape.ffn
    attention = 3 * e * h
    if shape.recompute == "none" and shape.attention == "fused":
        attention += e * h + 4 * shape.heads
    elif shape.recompute == "none":
        # In 32 bits the value is still that of the projection, which query and key share.
        attention = (3 * e if e == 4 else 4) * h + 2 * 4 * h + 3 * 4 * shape.heads * shape.tokens
    return between + (attention + e * h + mlp) // tp


def _encoder_flops(shape: TransformerShape) -> int:
    """Of one token forward: two per weight, and four per attended token and channel."""
    h = shape.hidden
    layer = 2 * (4 * h * h + 2 * h * shape.ffn) + 4 * shape.tokens * h
    return shape.layers * layer + 2 * shape.patch * h


@dataclass(frozen=True)
class Step:
    """How microbatches run through the step.

    Attributes:
        microbatches: of a step.
        stages: pipeline stages of the language model.
        encode_ahead: microbatches that are encoded together; None for all. Without stages those
            that are encoded before the language model needs them; None for none.
        encoder_trains, projector_trains: whether the part has anything to train.
    """

    microbatches: int = 1
    stages: int = 1
    encode_ahead: int | None = None
    encoder_trains: bool = True
    projector_trains: bool = True

    def __post_init__(self) -> None:
        for name in ("microbatches", "stages", "encode_ahead"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")

    @property
    def kept(self) -> int:
        """Microbatches whose encoder activations are there at a time.

        A window of ``w`` goes back when the first of ``p`` stages is through with it, which is
        ``ceil((p - 1) / w)`` windows later: at most ``p - 2 + 2 w`` microbatches. Without stages
        there are, beside the one that the language model works on, those that are encoded ahead
        and the one whose gradients are on their way back.

        >>> Step(16, stages=4, encode_ahead=1).kept, Step(16, stages=4, encode_ahead=2).kept
        (4, 6)
        >>> Step(16, stages=4).kept, Step(16).kept, Step(16, encode_ahead=1).kept
        (16, 1, 3)
        """
        if self.stages == 1:
            ahead = self.encode_ahead
            return 1 if ahead is None else min(self.microbatches, ahead + 2)
        window = self.encode_ahead or self.microbatches
        return min(self.microbatches, window * (1 - (1 - self.stages) // window))


@dataclass(frozen=True)
class Prediction:
    """What one policy comes to on one rank.

    Attributes:
        memory: the policy.
        held: bytes of one microbatch on the device between its forward and its backward pass.
        kept: microbatches that are there at a time.
        peak: bytes of all of them at most, one of them in its backward pass.
        host: bytes of all of them in host memory.
        moved: bytes copied per step, in both directions together.
        extra_flops: computed again, over what forward and backward passes of the modality take.
        saving: bytes less than with everything kept, while the language model runs.
    """

    memory: EncoderMemory
    held: int
    kept: int
    peak: int
    host: int
    moved: int
    extra_flops: Fraction
    saving: int

    @property
    def total(self) -> int:
        """Bytes on the device while the language model runs."""
        return self.held * self.kept


def predict(parts: PartBytes, step: Step, memory: EncoderMemory) -> Prediction:
    """Return what ``memory`` comes to.

    While the language model runs, each of the microbatches that are there holds

    * of an encoder that is kept what autograd keeps, of a recomputed one its inputs, of an
      offloaded one nothing;
    * of a projector that is kept what autograd keeps, of a recomputed one its input (nothing, if
      that is recomputed or offloaded with the encoder), of an offloaded one nothing.

    In its backward pass a microbatch has all of it, as if it had been kept. What stays because it
    is smaller than ``offload_from`` is not counted.
    """
    parts = _trained(parts, step)
    # Of a frozen encoder there is nothing to do anything about.
    encoder = memory.encoder if step.encoder_trains else KEEP
    projector = memory.projector
    held = {KEEP: parts.encoder, RECOMPUTE: parts.inputs, OFFLOAD: 0}[encoder]
    host = parts.encoder if encoder == OFFLOAD else 0
    if projector == KEEP:
        held += parts.projector
    elif projector == OFFLOAD:
        host += parts.projector
    elif memory.encoder == OFFLOAD:
        host += min(parts.rows, parts.projector)
    elif encoder != RECOMPUTE:
        held += min(parts.rows, parts.projector)
    again = (parts.encoder_flops if encoder == RECOMPUTE else 0) + (
        parts.projector_flops if projector == RECOMPUTE and parts.projector else 0
    )
    whole = 3 * (parts.encoder_flops + parts.projector_flops)
    everything = parts.encoder + parts.projector
    running = everything + (parts.inputs if encoder == RECOMPUTE else 0)
    return Prediction(
        memory=memory,
        held=held,
        kept=step.kept,
        peak=(step.kept - 1) * held + max(held, running),
        host=step.kept * host,
        moved=2 * step.microbatches * host,
        extra_flops=Fraction(again, whole) if whole else Fraction(0),
        saving=step.kept * (everything - held),
    )


def plan(parts: PartBytes, step: Step) -> list[Prediction]:
    """Return all policies of both parts, what is kept first."""
    order = (KEEP, RECOMPUTE, OFFLOAD)
    return [
        predict(parts, step, EncoderMemory(encoder, projector))
        for encoder, projector in itertools.product(order, repeat=2)
    ]


def _trained(parts: PartBytes, step: Step) -> PartBytes:
    """Without what has no backward pass."""
    if not step.encoder_trains:
        parts = replace(parts, encoder=0)
        if not step.projector_trains:
            parts = replace(parts, projector=0)
    return parts

