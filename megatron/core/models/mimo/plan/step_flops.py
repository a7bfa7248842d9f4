# SPDX-License-Identifier: Apache-2.0
"""FLOPs of one step, of the items that it encodes and the tokens that attend to one another.

The formulas are those of :mod:`.flops`. Padding is no work, a token behind the diagonal is none,
and a part that is frozen has no gradients of weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from megatron.core.models.mimo.plan.candidates import Candidate
from megatron.core.models.mimo.plan.flops import (
    Flops,
    encoder_flops,
    language_flops,
    patch_flops,
    projector_flops,
)
from megatron.core.models.mimo.plan.shapes import EncoderShape, Shapes
from mimo_colocated.launch.layouts import LANGUAGE, Layout


@dataclass(frozen=True)
class Frozen:
    """What does not train, by the names that a recipe gives.

    Attributes:
        names: ``language``, a modality, or ``MODALITY.encoder`` and ``MODALITY.projector``.
        adapted: modules in which adapters train: gradients go through all of them. The adapters'
            own work, as small as their rank, is not counted.
    """

    names: frozenset[str]
    adapted: frozenset[str] = frozenset()

    @classmethod
    def of(cls, names: Collection[str], shapes: Shapes, adapted: Collection[str] = ()) -> Frozen:
        """Return it, checked.

        Args:
            names: as of the class.
            shapes: of the model that they are parts of.
            adapted: as of the class.

        Raises:
            ValueError: a name of nothing, with those that there are.
        """
        parts = ("", ".encoder", ".projector")
        known = [LANGUAGE, *(f"{name}{part}" for name in shapes.encoders for part in parts)]
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ValueError(f"frozen: {unknown[0]!r} is none of {', '.join(known)}")
        return cls(frozenset(names), frozenset(adapted))

    def trains(self, encoder: str, part: str) -> bool:
        """Return whether an encoder's ``encoder`` or ``projector`` trains."""
        return not self.names & {encoder, f"{encoder}.{part}"}

    def any_encoder_trains(self, shapes: Shapes) -> bool:
        """Return whether gradients go through the language model to some encoder."""
        return any(
            name in self.adapted or self.trains(name, part)
            for name in shapes.encoders
            for part in ("encoder", "projector")
        )


def step_flops(
    shapes: Shapes,
    lengths: Sequence[int],
    rows: Mapping[str, Sequence[int]],
    frozen: Frozen,
    *,
    causal: bool,
) -> dict[str, float]:
    """Return module -> FLOPs of a forward and a backward pass over a global batch.

    Args:
        shapes: the model.
        lengths: tokens of each sample, padding left out.
        rows: encoder -> rows of each item that it encodes.
        frozen: what does not train.
        causal: False counts the whole square of a sample's scores, as PyTorch's counter does.
    """
    found = {
        name: sum(
            items * _item_flops(name, shape, own, shapes.width, frozen)
            for own, items in Counter(rows.get(name, ())).items()
        )
        for name, shape in shapes.encoders.items()
    }
    trained = LANGUAGE not in frozen.names
    # The text's embedding is the first to train; without it gradients go on to the encoders.
    through = trained or LANGUAGE in frozen.adapted or frozen.any_encoder_trains(shapes)
    language = language_flops(shapes.language, lengths, causal)
    return {**found, LANGUAGE: language.of_step(trained, through)}


def _sized(shape: EncoderShape, rows: int) -> EncoderShape:
    """The encoder for an item of so many rows, where its items have any size."""
    if rows == shape.rows:
        return shape
    return replace(shape, rows=rows, tokens=rows * (shape.tokens // shape.rows))


def _item_flops(name: str, shape: EncoderShape, rows: int, width: int, frozen: Frozen) -> float:
    """FLOPs of one item, forward and backward; one without rows is embedded all the same."""
    encoder, projector = frozen.trains(name, "encoder"), frozen.trains(name, "projector")
    embedding = _embedding_flops(_sized(shape, max(rows, 1)), trained=encoder)
    if not rows:
        return embedding
    shape = _sized(shape, rows)
    adapted = name in frozen.adapted
    whole = encoder_flops(shape, 1, width)
    layers = Flops(whole.layers, whole.attention, 0.0)
    joined = Flops(0.0, 0.0, projector_flops(shape, 1, width))
    through = encoder or adapted
    joined_flops = joined.of_step(projector, through=through)
    return layers.of_step(encoder, through=through) + embedding + joined_flops


def _embedding_flops(shape: EncoderShape, *, trained: bool) -> float:
    """FLOPs of an item's patches; pixels have no gradients, outputs of a first layer have."""
    patches = Flops(0.0, 0.0, patch_flops(shape, 1))
    inner = Flops(0.0, 0.0, patch_flops(shape, 1) * shape.inner / shape.patch)
    through = inner.of_step(trained) - inner.of_step(trained, through=False)
    return patches.of_step(trained, through=False) + through


def homogeneous_runs(language: Layout) -> int:
    """Return how often the homogeneous way encodes each item, as :class:`.Candidate` lays it out.

    Args:
        language: the layout that all modules have then; TP ranks share an item, CP ranks repeat it.

    >>> homogeneous_runs(Layout(tp=2, cp=4, dp=2))
    4
    """
    at = Candidate(language, {}, microbatches=1).encoder("")
    return language.size // (language.pp * at.size)
