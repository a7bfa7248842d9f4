# SPDX-License-Identifier: Apache-2.0
"""FLOPs of a forward and of a backward pass, by family of layer. Whatever counts FLOPs reads this.

A multiplication and an addition are two FLOPs, as ``torch.utils.flop_counter`` counts. What is
linear in the elements (norms, activations, rotary positions, softmax) is not counted, as there.

Attention is counted by pairs of a query and a key that it may see. A causal sequence of ``n``
tokens has ``n (n + 1) / 2`` of them, and packed sequences have those of each: what lies behind the
diagonal or in another sequence is no work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron.core.models.mimo.plan.shapes import EncoderShape, LanguageShape, Stack

BACKWARD_MATMUL = 2.0
"""A product's gradients are two products of the same size."""
BACKWARD_ATTENTION = 2.5
"""Five products for two, as the kernels form the scores again (Dao 2023, FlashAttention-2, 3.2)."""


@dataclass(frozen=True)
class Flops:
    """FLOPs of one forward pass.

    Attributes:
        layers: products of activations and weights in the layers.
        attention: products of activations.
        ends: embedding of patches, projector, output layer.
    """

    layers: float
    attention: float
    ends: float

    @property
    def forward(self) -> float:
        """All of them."""
        return self.layers + self.attention + self.ends

    def of_step(self, trained: bool = True, through: bool | None = None) -> float:
        """Return those that a forward pass and a backward pass need.

        What kernels compute again is not among them, as in a utilisation of the hardware's peak.

        Args:
            trained: weights have gradients.
            through: inputs have gradients, for what lies before; None for the same as ``trained``.
        """
        through = trained if through is None else through
        weighed = (self.layers + self.ends) * (1 + trained + through)
        return weighed + self.attention * (1 + BACKWARD_MATMUL * (trained or through))

    def __add__(self, other: Flops) -> Flops:
        return Flops(
            self.layers + other.layers,
            self.attention + other.attention,
            self.ends + other.ends,
        )

    def __mul__(self, factor: float) -> Flops:
        return Flops(self.layers * factor, self.attention * factor, self.ends * factor)


def seen_pairs(lengths: Sequence[int], causal: bool) -> int:
    """Return pairs of a query and a key that it may see, of packed sequences.

    Args:
        lengths: tokens of each sequence.
        causal: a token sees itself and what is before it, else all of its sequence.

    >>> seen_pairs([3, 2], causal=True), seen_pairs([3, 2], causal=False)
    (9, 13)
    """
    return sum(n * (n + 1) // 2 if causal else n * n for n in lengths)


def layer_flops(stack: Stack, tokens: float) -> float:
    """Return FLOPs of all layers' products with weights, two per weight and token.

    A token meets the experts that it is sent to and the router, not all experts.
    """
    routed = stack.expert_layers * stack.chosen * stack.one_expert_weights
    return 2 * tokens * (stack.dense_weights + routed)


def attention_flops(stack: Stack, pairs: float) -> float:
    """Return FLOPs of one layer's scores and of their product with the values.

    Args:
        stack: the layers.
        pairs: as :func:`seen_pairs` counts.
    """
    return 4 * pairs * stack.heads * stack.head


def language_flops(shape: LanguageShape, lengths: Sequence[int], causal: bool = True) -> Flops:
    """Return a language model's FLOPs for packed sequences.

    Args:
        shape: the language model.
        lengths: tokens of each sequence.
        causal: False counts the whole square of scores, as the counter of PyTorch does.
    """
    tokens = sum(lengths)
    attention = attention_flops(shape.stack, seen_pairs(lengths, causal))
    return Flops(
        layers=layer_flops(shape.stack, tokens),
        attention=shape.stack.layers * attention,
        ends=2 * tokens * shape.stack.hidden * shape.vocab,
    )


def patch_flops(shape: EncoderShape, items: float) -> float:
    """Return FLOPs of the embedding of so many items' patches."""
    return 2 * items * (shape.embedded or shape.tokens) * shape.patch * shape.stack.hidden


def projector_flops(shape: EncoderShape, items: float, width: int) -> float:
    """Return FLOPs of an encoder's projector; arguments as of :func:`encoder_flops`."""
    return 2 * items * shape.rows * shape.projector_weights(width)


def encoder_flops(shape: EncoderShape, items: float, width: int) -> Flops:
    """Return an encoder's and its projector's FLOPs.

    Args:
        shape: the encoder.
        items: that it encodes.
        width: of a row on the language side.
    """
    tokens = items * shape.tokens
    full = attention_flops(shape.stack, items * seen_pairs([shape.tokens], causal=False))
    full_layers, windowed = shape.stack.layers, 0.0
    if shape.window:
        full_layers = shape.full_layers
        within = attention_flops(shape.stack, tokens * shape.window)
        windowed = (shape.stack.layers - full_layers) * within
    return Flops(
        layers=layer_flops(shape.stack, tokens),
        attention=full_layers * full + windowed,
        ends=patch_flops(shape, items) + projector_flops(shape, items, width),
    )
