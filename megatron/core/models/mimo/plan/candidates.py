# SPDX-License-Identifier: Apache-2.0
"""All pairs of layouts that a model, a batch and a machine allow. Pure integers."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from megatron.core.models.mimo.memory.plan import LAYER_RECOMPUTE
from megatron.core.models.mimo.memory.policy import POLICIES, EncoderMemory
from megatron.core.models.mimo.plan.shapes import Shapes, Stack, Work
from mimo_colocated.launch.layouts import LANGUAGE, Layout, Layouts, Limits, misfits

BRIDGES = ("routed", "gather")
_ALONE = "encoder"
VIRTUAL_STAGES = (1, 2, 4)
"""Stages of a rank that are tried."""


@dataclass(frozen=True)
class Candidate:
    """One way to run a step.

    Attributes:
        language: layout of the language model.
        encoders: name -> layout; none where every encoder has the language model's, which is the
            homogeneous way: its TP and DP, on the first stage, the same items on every CP rank.
        microbatches: of a step.
        virtual_stages: stages of a rank.
        recompute: what layers compute again, as of :class:`~..memory.plan.TransformerShape`.
        memory: of every encoder's activations.
        bridge: ``"routed"`` or ``"gather"``.

    Raises:
        ValueError: an unknown name or a number that is not positive.
    """

    language: Layout
    encoders: Mapping[str, Layout]
    microbatches: int
    virtual_stages: int = 1
    recompute: str = "none"
    memory: EncoderMemory = field(default_factory=EncoderMemory)
    bridge: str = "routed"

    def __post_init__(self) -> None:
        for name in ("microbatches", "virtual_stages"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        for name, known in (("recompute", LAYER_RECOMPUTE), ("bridge", BRIDGES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}")

    @property
    def encode_ahead(self) -> int | None:
        """As of :class:`.Step`: as few as stages can have; without stages none go ahead."""
        return 1 if self.language.pp > 1 else None

    @property
    def homogeneous(self) -> bool:
        """Whether encoders have the language model's layout."""
        return not self.encoders

    def encoder(self, name: str) -> Layout:
        """Return an encoder's layout; a homogeneous one is repeated on other CP ranks."""
        if self.homogeneous:
            return Layout(tp=self.language.tp, dp=self.language.dp)
        return self.encoders[name]

    def __str__(self) -> str:
        """What the command line takes, with what is not a layout behind it."""
        parts = [f"--{name} {layout}" for name, layout in self.encoders.items()]
        parts.append(f"--{LANGUAGE} {self.language}")
        more = {"micro-batches": self.microbatches, "virtual-stages": self.virtual_stages}
        parts += [f"--{name} {value}" for name, value in more.items() if value > 1]
        if self.recompute != "none":
            parts.append(f"--recompute {self.recompute}")
        if self.bridge != "routed":
            parts.append(f"--bridge {self.bridge}")
        if self.memory != EncoderMemory():
            parts.append(f"--encoder-memory {self.memory.encoder}")
            parts.append(f"--projector-memory {self.memory.projector}")
        return " ".join(parts)


def problem(candidate: Candidate, shapes: Shapes, work: Work) -> str | None:
    """Return why a candidate cannot run, one clause; None if it can.

    Args:
        candidate: layouts and the rest.
        shapes: the model.
        work: the step.
    """
    language, m = candidate.language, candidate.microbatches
    # What is misfit of an encoder on the language model's own TP and DP is said of that model.
    encoders = candidate.encoders or {_ALONE: Layout(dp=language.size)}
    if wrong := misfits(Layouts(encoders, language), _limits(candidate, shapes, work)):
        return wrong[0]
    if work.samples % (language.dp * m):
        return (
            f"{work.samples} samples do not divide over language dp={language.dp} and "
            f"{m} microbatches"
        )
    if candidate.virtual_stages > 1 and (language.pp == 1 or m % language.pp):
        return (
            f"{candidate.virtual_stages} virtual stages need language pp above 1 and a number of "
            f"microbatches that pp={language.pp} divides, got {m}"
        )
    for name, shape in shapes.encoders.items():
        at = candidate.encoder(name)
        if why := _uncut(shape.stack, at.tp):
            return f"{name} tp={at.tp} does not divide its {why}"
        if at.cp > 1 and candidate.bridge == "gather":
            return f"gather takes whole items, got {name} cp={at.cp}; plan routed"
        items = work.items(name, shape) * work.samples // m
        if candidate.encoder(name).dp > items:
            return (
                f"{name} dp={candidate.encoder(name).dp} has more replicas than a microbatch has "
                f"items, {items}"
            )
        if candidate.bridge == "gather" and (why := _ungathered(name, candidate, items)):
            return why
    if why := _uncut(shapes.language.stack, language.tp):
        return f"language tp={language.tp} does not divide its {why}"
    return None


def _ungathered(name: str, candidate: Candidate, items: int) -> str | None:
    """Why the gather bridge, whose replicas have equal blocks of items, cannot join the two."""
    if candidate.language.pp > 1:
        pp = candidate.language.pp
        return f"gather is planned without pipeline stages, got language pp={pp}; plan routed"
    high = max(candidate.encoder(name).dp, candidate.language.dp)
    if items % high:
        return f"gather needs {items} items of a microbatch to divide over dp={high} replicas"
    return None


def _uncut(stack: Stack, tp: int) -> str | None:
    """What TP ranks cannot have equal parts of."""
    for words, count in (
        (f"MLP width of {stack.ffn}", stack.ffn),
        (f"{stack.groups} key/value heads", stack.groups),
    ):
        if count % tp:
            return words
    return None


def _limits(candidate: Candidate, shapes: Shapes, work: Work) -> Limits:
    stack = shapes.language.stack
    heads = {name: each.stack.groups for name, each in shapes.encoders.items()}
    return Limits(
        # Whole samples matter to the language model alone: replicas of an encoder share out items.
        global_batch_size=0,
        sequence_parallel=True,
        sequence_length=work.sequence,
        heads={**heads, LANGUAGE: stack.groups},
        experts=stack.experts if stack.expert_layers else 0,
        language_layers=stack.layers,
        virtual_stages=candidate.virtual_stages,
        cut_items=[name for name, each in shapes.encoders.items() if each.cuts_items],
    )


@dataclass(frozen=True)
class Search:
    """What is tried.

    Attributes:
        ranks: of the job.
        node: ranks of a node; TP does not go beyond.
        replica_samples: samples of a language replica in one microbatch.
        stages: pipeline sizes; none for all that divide the layers.
        experts: EP sizes of a model with experts.
        encoder_memory: what may become of encoders' activations.
        bridge: of the colocated, ``"routed"`` or ``"gather"``.
        encoder_cp: CP sizes of encoders that can cut their items; TP times CP stays in a node.

    Raises:
        ValueError: an unknown policy.
    """

    ranks: int
    node: int
    replica_samples: tuple[int, ...] = (1, 2)
    stages: tuple[int, ...] = ()
    experts: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    encoder_memory: tuple[str, ...] = POLICIES
    bridge: str = "routed"
    encoder_cp: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        unknown = [each for each in self.encoder_memory if each not in POLICIES]
        if unknown or not self.encoder_memory:
            raise ValueError(
                f"encoder_memory must be one or more of {POLICIES}, got {self.encoder_memory}"
            )


def candidates(shapes: Shapes, work: Work, search: Search) -> Iterator[Candidate]:
    """Yield every pair that can run, without any policy of memory.

    Homogeneous ones come first for each layout of the language model.

    Args:
        shapes: the model.
        work: the step.
        search: what is tried.
    """
    alone = Shapes(shapes.language, {})
    for start in _language_candidates(shapes, work, search):
        if problem(start, alone, work) is not None:
            continue
        if shapes.encoders and problem(start, shapes, work) is None:
            yield start
        for encoders in _encoder_layouts(shapes, search):
            each = replace(start, encoders=encoders, bridge=search.bridge)
            if not shapes.encoders or problem(each, shapes, work) is None:
                yield each


def obstacle(shapes: Shapes, work: Work, search: Search) -> str | None:
    """Return what most often keeps a pair from running, one clause; None if nothing is tried.

    Args:
        shapes, work, search: for which :func:`candidates` yields nothing.
    """
    tried = (
        replace(start, encoders=encoders, bridge=search.bridge)
        for start in _language_candidates(shapes, work, search)
        for encoders in _encoder_layouts(shapes, search)
    )
    said = Counter(why for each in tried if (why := problem(each, shapes, work)))
    return said.most_common(1)[0][0] if said else None


def _language_candidates(shapes: Shapes, work: Work, search: Search) -> Iterator[Candidate]:
    """Homogeneous candidates, whether or not they can run."""
    stack = shapes.language.stack
    sizes = _divisors(search.ranks)
    tps = [n for n in sizes if n <= search.node and stack.groups % n == 0]
    stages = search.stages or tuple(n for n in sizes if stack.layers % n == 0)
    experts = search.experts if stack.expert_layers else (1,)
    for tp, cp, pp in itertools.product(tps, sizes, stages):
        dp, rest = divmod(search.ranks, tp * cp * pp)
        if rest or not dp or work.samples % dp or work.sequence % (2 * cp * tp if cp > 1 else tp):
            continue
        for count, ep, virtual in itertools.product(
            search.replica_samples, experts, VIRTUAL_STAGES if pp > 1 else (1,)
        ):
            m, left = divmod(work.samples, dp * count)
            if m and not left and stack.layers % (pp * virtual) == 0:
                etp = tp if ep == 1 else 1
                yield Candidate(Layout(tp, cp, dp, ep, etp, pp), {}, m, virtual)


def _encoder_layouts(shapes: Shapes, search: Search) -> Iterator[dict[str, Layout]]:
    """Layouts of all encoders together."""
    sizes = [n for n in _divisors(search.ranks) if n <= search.node]
    each = [
        [
            Layout(tp, cp, search.ranks // (tp * cp))
            for tp in sizes
            if not _uncut(shape.stack, tp)
            for cp in (search.encoder_cp if shape.cuts_items else (1,))
            if tp * cp in sizes and shape.stack.groups % (tp * cp) == 0
        ]
        for shape in shapes.encoders.values()
    ]
    for chosen in itertools.product(*each):
        yield dict(zip(shapes.encoders, chosen, strict=True))


def _divisors(number: int) -> list[int]:
    """Ascending.

    >>> _divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    low = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*low, *(number // n for n in low)})
