# SPDX-License-Identifier: Apache-2.0
"""Sizes of the modules and of what a step trains on. Pure integers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields


@dataclass(frozen=True)
class Stack:
    """Equal transformer layers, of a language model or of an encoder.

    Attributes:
        layers, hidden: number and width.
        ffn: width of an MLP's hidden layer.
        heads, groups, head: query heads, key/value heads, channels of a head.
        gated: the MLP has a gate beside its first layer.
        experts: of a layer that has experts in place of its MLP; 0 for none.
        chosen: experts that one token goes to.
        expert_ffn: width of an expert's hidden layer.
        expert_layers: layers that have experts.

    Raises:
        ValueError: a size that is not positive, or heads that do not divide.
    """

    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    head: int
    gated: bool = False
    experts: int = 0
    chosen: int = 0
    expert_ffn: int = 0
    expert_layers: int = 0

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "ffn", "heads", "groups", "head"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.heads % self.groups:
            raise ValueError(
                f"heads={self.heads} must be a multiple of groups={self.groups}, which share "
                "key and value"
            )
        if not 0 <= self.expert_layers <= self.layers:
            raise ValueError(
                f"expert_layers must be 0 to layers={self.layers}, got {self.expert_layers}"
            )
        if self.expert_layers and not 1 <= self.chosen <= self.experts:
            raise ValueError(
                f"chosen must be 1 to experts={self.experts} where layers have experts, got "
                f"{self.chosen}"
            )

    @classmethod
    def of(cls, layers: int, hidden: int, ffn: int, heads: int, *, gated: bool = False) -> Stack:
        """Return layers whose heads share nothing and span the width together.

        >>> Stack.of(32, 4096, 11008, 32, gated=True).head
        128
        """
        return cls(layers, hidden, ffn, heads, heads, hidden // heads, gated)

    @property
    def attention_weights(self) -> int:
        """Weights of one layer's query, key, value and output projections."""
        return self.hidden * self.head * 2 * (self.heads + self.groups)

    @property
    def mlp_weights(self) -> int:
        """Weights of one layer's MLP."""
        return (3 if self.gated else 2) * self.hidden * self.ffn

    @property
    def one_expert_weights(self) -> int:
        """Weights of one expert."""
        return (3 if self.gated else 2) * self.hidden * self.expert_ffn

    @property
    def dense_weights(self) -> int:
        """Weights of all layers, their experts aside."""
        dense = self.layers - self.expert_layers
        routers = self.expert_layers * self.hidden * self.experts
        return self.layers * self.attention_weights + dense * self.mlp_weights + routers

    @property
    def expert_weights(self) -> int:
        """Weights of all experts of all layers."""
        return self.expert_layers * self.experts * self.one_expert_weights

    @property
    def weights(self) -> int:
        """Weights of all layers; biases and norms are not counted."""
        return self.dense_weights + self.expert_weights


@dataclass(frozen=True)
class LanguageShape:
    """A language model.

    Attributes:
        stack: its layers.
        vocab: size of the vocabulary.
        tied: the output layer is the embedding.
    """

    stack: Stack
    vocab: int
    tied: bool = False

    @property
    def weights(self) -> int:
        """Weights, the embedding and the output layer among them.

        >>> shape = LanguageShape(Stack.of(32, 4096, 11008, 32, gated=True), 32000)
        >>> round(shape.weights / 1e9, 2)
        6.74
        """
        return self.stack.weights + (1 if self.tied else 2) * self.vocab * self.stack.hidden


@dataclass(frozen=True)
class EncoderShape:
    """An encoder with its projector.

    Attributes:
        stack: its layers.
        tokens: of one item (the patches of an image).
        rows: that one item becomes.
        patch: numbers of a token that the embedding reads.
        row: width of what the projector reads; that of the layers, or of several tokens together.
        projected: width of the projector's hidden layer; 0 for one linear layer.
        levels: further projectors, whose rows are added after layers of the language model.
        window: tokens that attend to one another; 0 for all of an item's.
        full_layers: layers that attend to all tokens of an item in spite of the window.
        sequence_parallel: TP ranks cut its tokens between products.
        embedded: tokens that the embedding makes of every item, however few it has; 0 for its own.
        inner: of ``patch``, those that are outputs of a layer themselves (two convolutions).
        cuts_items: CP ranks can have a part of each item's tokens.

    Raises:
        ValueError: a size that is not positive, or more rows than tokens.
    """

    stack: Stack
    tokens: int
    rows: int
    patch: int
    row: int
    projected: int
    levels: int = 0
    window: int = 0
    full_layers: int = 0
    sequence_parallel: bool = False
    embedded: int = 0
    inner: int = 0
    cuts_items: bool = False

    def __post_init__(self) -> None:
        for name in ("tokens", "rows", "patch", "row"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.rows > self.tokens:
            raise ValueError(f"rows={self.rows} must be at most tokens={self.tokens}")

    def projector_weights(self, width: int) -> int:
        """Return the weights of all projectors to rows of a width."""
        inner = self.projected
        one = self.row * inner + inner * width if inner else self.row * width
        return one * (1 + self.levels)

    def weights(self, width: int) -> int:
        """Return all weights, of a projector to rows of a width among them."""
        embedding = self.patch * self.stack.hidden
        return self.stack.weights + embedding + self.projector_weights(width)


@dataclass(frozen=True)
class Trained:
    """What of a module, or of an encoder's part, trains.

    Attributes:
        share: of its own weights, from 0 for a frozen one to 1.
        added: weights of adapters beside them, which all train.

    Raises:
        ValueError: a share that is no part of a whole, or fewer weights than none.
    """

    share: float = 1.0
    added: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1 or self.added < 0:
            raise ValueError(
                f"share must be from 0 to 1 and added 0 or more, got {self.share!r} and "
                f"{self.added!r}"
            )

    @property
    def any(self) -> bool:
        """Whether something trains, so that gradients go through."""
        return self.share > 0 or self.added > 0


ENCODER, PROJECTOR = "encoder", "projector"
"""Parts of an encoder that train apart from each other."""


@dataclass(frozen=True)
class Work:
    """What one step trains on.

    Attributes:
        sequence: tokens of a sample.
        samples: of a step, over all ranks and microbatches.
        shares: encoder -> the part of a sample's tokens that are its rows.
        itemsize: bytes of a weight and of an activation.
        frozen_modules: those that do not train.
        trained: ``language``, ``ENCODER.encoder`` or ``ENCODER.projector`` -> what of it trains;
            all of what is not named and not frozen.

    Raises:
        ValueError: a size that is not positive, or shares that are no parts of a whole.
    """

    sequence: int
    samples: int
    shares: Mapping[str, float]
    itemsize: int = 2
    frozen_modules: frozenset[str] = frozenset()
    trained: Mapping[str, Trained] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("sequence", "samples", "itemsize"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        low, total = min(self.shares.values(), default=0.0), sum(self.shares.values())
        if low < 0 or total > 1:
            raise ValueError(
                f"shares must be 0 or more and at most 1 together, got {dict(self.shares)}"
            )

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.sequence * self.samples

    def trains(self, name: str, part: str = "") -> Trained:
        """Return what trains of the language model, or of an encoder's part.

        Args:
            name: ``language`` or an encoder.
            part: of an encoder: ``encoder`` or ``projector``.
        """
        if name in self.frozen_modules:
            return Trained(0.0)
        return self.trained.get(f"{name}.{part}" if part else name, Trained())

    def encoder_trains(self, name: str) -> bool:
        """Return whether anything of an encoder or its projector trains."""
        return any(self.trains(name, part).any for part in (ENCODER, PROJECTOR))

    def items(self, name: str, encoder: EncoderShape) -> int:
        """Return whole items of an encoder in one sample, as many as its share has room for."""
        return int(self.sequence * self.shares[name]) // encoder.rows


@dataclass(frozen=True)
class Shapes:
    """A whole model.

    Attributes:
        language: the language model.
        encoders: name -> encoder, in the model's order.
    """

    language: LanguageShape
    encoders: Mapping[str, EncoderShape]

    @property
    def width(self) -> int:
        """Width of a row on the language side."""
        return self.language.stack.hidden


def shapes_from(values: Mapping[str, object]) -> Shapes:
    """Return shapes from plain values, as a YAML or JSON file has them.

    Args:
        values: ``language`` and ``encoders`` with the fields of the classes here.

    Raises:
        ValueError: an unknown or a missing field, with those that there are.

    >>> layers = dict(layers=2, hidden=64, ffn=128, heads=4, groups=4, head=16)
    >>> eye = dict(stack=layers, tokens=16, rows=4, patch=48, row=256, projected=64)
    >>> shapes = shapes_from(dict(language=dict(stack=layers, vocab=9), encoders=dict(eye=eye)))
    >>> shapes.width, shapes.encoders["eye"].rows
    (64, 4)
    """
    top = _fields(values, "the model", {"language", "encoders"}, {"language"})
    encoders = _mapping(top.get("encoders", {}), "encoders")
    return Shapes(
        _part(LanguageShape, top["language"], "language"),
        {str(name): _part(EncoderShape, e, f"encoder {name}") for name, e in encoders.items()},
    )


def _part(kind: type, values: object, where: str):  # noqa: ANN202 -- of the kind asked for
    names = {each.name for each in fields(kind)}
    given = _fields(values, where, names, {"stack"})
    try:
        stack = Stack(**_fields(given["stack"], f"{where}'s stack", _STACK, set()))
        return kind(**{**given, "stack": stack})
    except TypeError as error:
        raise ValueError(f"{where}: {error}; its fields are {sorted(names)}") from None


def _mapping(values: object, where: str) -> Mapping:
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} must be a mapping of names to values, got {values!r}")
    return values


def _fields(values: object, where: str, known: set[str], needed: set[str]) -> dict:
    given = _mapping(values, where)
    unknown, missing = sorted(set(given) - known), sorted(needed - set(given))
    if unknown or missing:
        raise ValueError(
            f"{where} has unknown fields {unknown} and lacks {missing}; its fields are "
            f"{sorted(known)}"
        )
    return dict(given)


_STACK = {each.name for each in fields(Stack)}
