# SPDX-License-Identifier: Apache-2.0
"""Which layouts fit together, as options of a job: pure integers, no torch.

:func:`misfits` lists what does not fit, with the numbers; :func:`suggest` finds the nearest layouts
that do; :func:`check_layouts` puts both into one sentence.

>>> asked = Layouts({"vision": Layout(tp=2, dp=4)}, Layout(tp=2, cp=2, dp=4))
>>> print(suggestion(asked, Limits(64)))
--vision tp=2,dp=4 --language tp=2,cp=2,dp=2
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace

from mimo_colocated.launch.errors import JobError

MAX_RANKS = 16_384
"""Of the largest job that is checked."""
LANGUAGE = "language"
"""Name of the language model's layout; every other one is an encoder's."""

_LANGUAGE_AXES, _ENCODER_AXES = ("tp", "cp", "pp", "dp"), ("tp", "cp", "dp")
# Another cut of the language model's ranks, for its experts.
_EXPERT_AXES = ("ep", "etp")


@dataclass(frozen=True)
class Layout:
    """Sizes of one module's axes; ``str(layout)`` is what the command line takes.

    ``ep`` ranks share out a layer's experts and ``etp`` ranks (0: as many as ``tp``) share one.
    """

    tp: int = 1
    cp: int = 1
    dp: int = 1
    ep: int = 1
    etp: int = 0
    pp: int = 1

    @property
    def size(self) -> int:
        """Ranks that the layout spans."""
        return self.tp * self.cp * self.dp * self.pp

    def __str__(self) -> str:
        cp = f"cp={self.cp}," if self.cp > 1 else ""
        ep = f",ep={self.ep}" if self.ep > 1 else ""
        etp = f",etp={self.etp}" if self.etp not in (0, self.tp) else ""
        pp = f"pp={self.pp}," if self.pp > 1 else ""
        return f"tp={self.tp},{cp}{pp}dp={self.dp}{ep}{etp}"

    @property
    def expert_tp(self) -> int:
        """Ranks that share one expert."""
        return self.etp or self.tp

    @classmethod
    def parse(cls, text: str, module: str) -> Layout:
        """Read ``"tp=2,cp=2,dp=2"``; an axis that is left out is 1.

        Args:
            text: the axes and their sizes.
            module: ``"language"`` or an encoder's name, as the option is called.

        Raises:
            JobError: for an unknown or repeated axis and for anything but whole numbers from 1.
        """
        sizes: dict[str, int] = {}
        known = (*_axes(module), *(_EXPERT_AXES if module == LANGUAGE else ()))
        for part in text.split(","):
            axis, equals, number = (piece.strip() for piece in part.partition("="))
            if not equals or axis not in known:
                raise JobError(
                    f"--{module} {text!r}: {part.strip()!r} is not an axis and its size; "
                    f"the axes are {', '.join(_axes(module))}, as in {_example(module)}"
                )
            if axis in sizes:
                raise JobError(f"--{module} {text!r}: {axis} is given twice; give it once")
            whole = number.isascii() and number.isdecimal() and len(number) < 10
            if not whole or not 1 <= int(number) <= MAX_RANKS:
                raise JobError(
                    f"--{module} {text!r}: {axis} must be a whole number from 1 to {MAX_RANKS}, "
                    f"got {number!r}, as in {_example(module)}"
                )
            sizes[axis] = int(number)
        return cls(**sizes)


def _axes(module: str) -> tuple[str, ...]:
    return _LANGUAGE_AXES if module == LANGUAGE else _ENCODER_AXES


def _example(module: str) -> str:
    return f"--{module} " + ",".join(f"{axis}=2" for axis in _axes(module))


@dataclass(frozen=True)
class Layouts:
    """The layouts of a job; ``str(layouts)`` is what the command line takes.

    Attributes:
        encoders: name -> layout. The first is what a suggestion looks for, the others follow.
        language: the language model's.
    """

    encoders: Mapping[str, Layout]
    language: Layout

    @property
    def modules(self) -> dict[str, Layout]:
        """All of them by name, the language model's last."""
        return {**self.encoders, LANGUAGE: self.language}

    def __str__(self) -> str:
        return " ".join(f"--{name} {layout}" for name, layout in self.modules.items())


@dataclass(frozen=True)
class Limits:
    """What the layouts must divide.

    Attributes:
        global_batch_size: samples per step over all ranks and microbatches.
        micro_batches: microbatches per step.
        eval_batch_size: samples per held-out batch.
        sequence_parallel: the language model also cuts the sequence over TP.
        world_size: ranks already started, or None when the layouts decide.
        sequence_length: tokens per sample, 0 for any.
        heads: module -> attention heads (key/value heads if there are fewer); others have any.
        items: encoder -> what it encodes, in the plural.
        experts: of each layer of the language model, 0 without.
        language_layers: layers of the language model, cut over its pipeline stages; 0 for any.
        virtual_stages: stages per rank.
        cut_items: encoders that can cut each item's sequence over CP, and share out heads over it.
    """

    global_batch_size: int
    micro_batches: int = 1
    eval_batch_size: int | None = None
    sequence_parallel: bool = False
    world_size: int | None = None
    sequence_length: int = 0
    heads: Mapping[str, int] = field(default_factory=dict)
    items: Mapping[str, str] = field(default_factory=dict)
    experts: int = 0
    language_layers: int = 0
    virtual_stages: int = 1
    cut_items: Collection[str] = ()


def misfits(pair: Layouts, limits: Limits) -> list[str]:
    """Return what does not fit, one clause each; nothing if the layouts run."""
    return [
        *_rank_misfits(pair, limits),
        *_batch_misfits(pair, limits),
        *_model_misfits(pair, limits),
        *_expert_misfits(pair.language, limits),
    ]


def _rank_misfits(pair: Layouts, limits: Limits) -> Iterator[str]:
    for name, encoder in pair.encoders.items():
        yield from _encoder_misfits(name, encoder, pair.language, limits)


def _encoder_misfits(
    name: str, encoder: Layout, language: Layout, limits: Limits
) -> Iterator[str]:
    world, items = limits.world_size, limits.items.get(name, "inputs")
    if encoder.cp != 1 and name not in limits.cut_items:
        yield (
            f"{name} has cp={encoder.cp}, but its encoder does not cut {items} over CP, and cp "
            "must be 1"
        )
    if encoder.size != language.size:
        yield (
            f"{name} {encoder} spans {_ranks(encoder.size)}, "
            f"language {language} spans {language.size}, and both must span the same ranks"
        )
    elif encoder.size > MAX_RANKS:
        yield f"{name} {encoder} spans {encoder.size} ranks, more than {MAX_RANKS}"
    elif world is not None and encoder.size != world:
        yield (
            f"{name} {encoder} and language {language} span {_ranks(encoder.size)}, "
            f"but the job has {_ranks(world)}"
        )
    if max(encoder.dp, language.dp) % min(encoder.dp, language.dp):
        yield (
            f"{name} dp={encoder.dp} and language dp={language.dp} do not divide, "
            "and the larger must be a multiple of the smaller"
        )


def _batch_misfits(pair: Layouts, limits: Limits) -> Iterator[str]:
    batch, micro = limits.global_batch_size, limits.micro_batches
    if batch % micro:
        yield f"a global batch of {batch} samples does not divide into {micro} microbatches"
    for name, layout in pair.modules.items():
        if batch % micro == 0 and (batch // micro) % layout.dp:
            yield (
                f"a microbatch of {batch // micro} samples (global batch {batch} / {micro} "
                f"microbatches) does not divide over {name} dp={layout.dp}"
            )
        if limits.eval_batch_size is not None and limits.eval_batch_size % layout.dp:
            yield (
                f"an evaluation batch of {limits.eval_batch_size} samples does not divide over "
                f"{name} dp={layout.dp}"
            )


def _model_misfits(pair: Layouts, limits: Limits) -> Iterator[str]:
    for name, layout in pair.modules.items():
        heads = limits.heads.get(name, 0)
        by, cut = f"{name} tp={layout.tp}", layout.tp
        if name in limits.cut_items and layout.cp > 1:
            by, cut = f"{by} * cp={layout.cp}", layout.tp * layout.cp
        if heads % cut:
            yield f"{by} does not divide its {heads} attention heads"
    language = pair.language
    stages = language.pp * limits.virtual_stages
    if limits.language_layers % stages:
        virtual = f" with {limits.virtual_stages} virtual stages each" * (stages > language.pp)
        yield (
            f"language pp={language.pp}{virtual} does not divide its {limits.language_layers} "
            "layers into equal stages"
        )
    parts = 2 * language.cp if language.cp > 1 else 1
    by = f"2 * cp={language.cp}" if language.cp > 1 else ""
    if limits.sequence_parallel and language.tp > 1:
        parts *= language.tp
        by += f"{' * ' if by else ''}tp={language.tp}"
    if limits.sequence_length % parts:
        yield f"a sequence of {limits.sequence_length} tokens does not divide by {by} = {parts}"


def _expert_misfits(language: Layout, limits: Limits) -> Iterator[str]:
    ep, etp = language.ep, language.expert_tp
    if not limits.experts:
        if (ep, etp) != (1, language.tp):
            yield f"language {language} shares out experts, and the model has none: give --experts"
        return
    if limits.experts % ep:
        yield f"language ep={ep} does not divide its {limits.experts} experts"
    ranks, stage = language.size // language.pp, " of a stage" if language.pp > 1 else ""
    if ranks % (ep * etp):
        yield (
            f"language ep={ep} with {_ranks(etp)} for each expert does not divide its "
            f"{_ranks(ranks)}{stage}"
        )
    if language.tp > 1 and not limits.sequence_parallel:
        yield f"language tp={language.tp} with experts needs --sequence-parallel"


def _ranks(count: int) -> str:
    return "1 rank" if count == 1 else f"{count} ranks"


def suggest(pair: Layouts, limits: Limits) -> tuple[Layouts, Limits]:
    """Return the nearest layouts without misfits, and the limits that they fit.

    Layouts change before batch sizes do. Only where the layouts are right already, or where no
    layout of the ranks that are there fits the batch, the batch sizes are rounded up instead.
    """
    layouts_fit = not [
        *_rank_misfits(pair, limits),
        *_model_misfits(pair, limits),
        *_expert_misfits(pair.language, limits),
    ]
    better = pair if layouts_fit else _nearest(pair, limits)
    if better is None:
        better = _nearest(pair, replace(limits, global_batch_size=0, eval_batch_size=0))
    assert better is not None  # tp=1,dp=ranks on both sides fits any model
    parts = math.lcm(*(layout.dp for layout in better.modules.values()))
    per_step, wanted = limits.micro_batches * parts, limits.eval_batch_size
    rounded = replace(
        limits,
        global_batch_size=-(-limits.global_batch_size // per_step) * per_step,
        eval_batch_size=None if wanted is None else -(-wanted // parts) * parts,
    )
    return better, rounded


def suggestion(pair: Layouts, limits: Limits) -> str:
    """Return options that fit: layouts, and the batch sizes that have to change with them."""
    better, rounded = suggest(pair, limits)
    text = str(better)
    if rounded.global_batch_size != limits.global_batch_size:
        text += f" --global-batch-size {rounded.global_batch_size}"
    if rounded.eval_batch_size != limits.eval_batch_size:
        text += f" --eval-batch-size {rounded.eval_batch_size}"
    return text


def check_layouts(pair: Layouts, limits: Limits) -> None:
    """Refuse layouts that do not fit.

    Raises:
        JobError: the first misfit with its numbers, and options that would fit.
    """
    wrong = misfits(pair, limits)
    if wrong:
        raise JobError(f"{wrong[0]}; try {suggestion(pair, limits)}")


def _nearest(pair: Layouts, limits: Limits) -> Layouts | None:
    """On the ranks that are there, else on as many as a module asked for, else on fewer.

    Further encoders follow the first and the language model: what fits the first would fit them.
    """
    first = next(iter(pair.encoders))
    asked = sorted({pair.encoders[first].size, pair.language.size})
    worlds = [[limits.world_size]] if limits.world_size is not None else [asked]
    if limits.world_size is None:
        worlds += [[size] for size in range(min(asked[0] - 1, 256), 0, -1)]
    for sizes in worlds:
        stages = {1, pair.language.pp}
        small = [size for size in sizes if size <= MAX_RANKS]
        cps = _cps(first, pair.encoders[first], limits)
        every = (other for size in small for other in every_pair(size, stages, first, cps))
        fits = [other for other in every if not misfits(other, limits)]
        if fits:
            nearest = min(fits, key=lambda other: _distance(pair, other, first))
            for name in list(pair.encoders)[1:]:
                nearest = _with_encoder(name, pair.encoders[name], nearest, limits)
            return nearest
    return None


def _with_encoder(name: str, asked: Layout, pair: Layouts, limits: Limits) -> Layouts:
    """The layouts with the nearest one of a further encoder that fits them."""
    ranks = pair.language.size
    sizes = [tp for tp in range(1, ranks + 1) if ranks % tp == 0]
    every = [
        replace(pair, encoders={**pair.encoders, name: Layout(tp, cp, ranks // (tp * cp))})
        for tp in sizes
        for cp in _cps(name, asked, limits)
        if ranks % (tp * cp) == 0
    ]
    fits = [other for other in every if not misfits(other, limits)]
    return min(fits, key=lambda o: (_change(asked, o.encoders[name]), o.encoders[name].tp))


def _cps(name: str, asked: Layout, limits: Limits) -> list[int]:
    """CP of an encoder that is worth a try: the one that was asked for, or none."""
    return sorted({1, asked.cp} if name in limits.cut_items else {1})


def every_pair(
    world: int,
    stages: Collection[int] = (1,),
    encoder: str = "vision",
    cps: Collection[int] = (1,),
) -> Iterator[Layouts]:
    """Yield all layouts of ``world`` ranks, whether or not anything else fits.

    Args:
        world: ranks.
        stages: pipeline sizes of the language model to try.
        encoder: name of the only encoder.
        cps: CP sizes of it to try.
    """
    sizes = [size for size in range(1, world + 1) if world % size == 0]
    languages = [
        Layout(tp, cp, world // (tp * cp * pp), pp=pp)
        for pp in sorted(stages)
        for tp in sizes
        for cp in sizes
        if world % (tp * cp * pp) == 0
    ]
    for tp in sizes:
        for cp in sorted(cps):
            if world % (tp * cp):
                continue
            for language in languages:
                yield Layouts({encoder: Layout(tp, cp, world // (tp * cp))}, language)


def _distance(pair: Layouts, other: Layouts, first: str) -> tuple[float, ...]:
    """Few changed axes first (DP, CP, TP, PP in this order), then small changes, then few ranks."""
    encoder, language = other.encoders[first], other.language
    changes = (_change(pair.encoders[first], encoder), _change(pair.language, language))
    changed, far = (sum(values) for values in zip(*changes, strict=True))
    return (changed, far, encoder.size, encoder.tp, language.tp, language.cp)


def _change(old: Layout, new: Layout) -> tuple[int, float]:
    """(changed axes, with weights that tell them apart; by how many factors of two)."""
    changed, far = 0, 0.0
    for axis, weight in (("dp", 100), ("cp", 101), ("tp", 102), ("pp", 103)):
        was, now = getattr(old, axis), getattr(new, axis)
        changed += weight * (was != now)
        far += abs(math.log2(now / was))
    return changed, far
