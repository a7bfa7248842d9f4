# SPDX-License-Identifier: Apache-2.0
"""Which runs are saved, which continue them, and in which launches: no torch, no processes.

A *case* is a pair of places: a run saved at one, continued at the other. All runs of a world size
are saved in one launch, and continued in another: the reader of a checkpoint is never the process
that wrote it. A *chain* goes through several world sizes and saves again at each.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from examples.mimo.digits.options import SEQUENCE_LENGTH
from mimo_colocated.launch.layouts import Limits, every_pair, misfits
from tests.parity.rows import axis_sizes

BATCH = 16
# Of models that may have pipeline stages: enough for stages to work on different ones.
MICRO_BATCHES = 2
# The model of tests/unit_tests/mimo/digits_runs.py: 8 vision heads, 4 key/value heads.
_LIMITS = Limits(
    BATCH, MICRO_BATCHES, sequence_length=SEQUENCE_LENGTH, heads={"vision": 8, "language": 4}
)
# Layers of language models that may have pipeline stages.
LAYERS = 4
# TEXT_SIZE of tests/parity/measure.py: key/value heads.
_TEXT_HEADS = 4
# Steps before the save: two, so that Adam's moments and step count are not those of the first.
SAVED_STEPS = 2
NEXT_STEPS = 5
# A chain trains this many steps at each stop but the last, where it trains NEXT_STEPS.
HOP_STEPS = 2


@dataclass(frozen=True, order=True)
class Place:
    """Layouts of a run.

    Attributes:
        vision, language: as the job's options take them, "tp=2,dp=4". Without a vision side it is
            the language model alone.
        distributed: the optimizer's state is sharded over DP.
        sequence_parallel: of the language model, whose TP is more than 1 then.
        tied: the language model's embeddings are its head, too. This one and the language model
            alone may have pipeline stages: "tp=2,pp=2,dp=2".
        virtual_stages: of the language model on each rank.
    """

    vision: str
    language: str
    distributed: bool
    sequence_parallel: bool = False
    tied: bool = False
    virtual_stages: int = 1

    @property
    def world(self) -> int:
        """Ranks of the run."""
        return math.prod(axis_sizes(self.language).values())

    @property
    def model(self) -> str:
        """Which model it is a place of; only runs of one model continue each other."""
        return ("images" if self.vision else "text") + "-tied" * self.tied

    @property
    def key(self) -> str:
        """Name for files: ``v-tp2-dp4_l-tp2-cp2-dp2_sharded_sp``, ``text_l-tp1-pp4-dp1_whole``."""
        kind = "sharded" if self.distributed else "whole"
        first = f"v-{self.vision}{'-tied' * self.tied}" if self.vision else self.model
        text = f"{first}_l-{self.language}_{kind}" + "_sp" * self.sequence_parallel
        text += f"_vp{self.virtual_stages}" if self.virtual_stages > 1 else ""
        return re.sub(r"=", "", text).replace(",", "-")

    def __str__(self) -> str:
        first = f"{'tied ' * self.tied}{self.vision} |" if self.vision else self.model
        text = f"{first} {self.language}" + " SP" * self.sequence_parallel
        return text + (f" VP{self.virtual_stages}" if self.virtual_stages > 1 else "")


@dataclass(frozen=True, order=True)
class Case:
    """A run that is saved at the first place and continues at the others in turn."""

    places: tuple[Place, ...]

    @property
    def key(self) -> str:
        """Name for files and results."""
        return "__".join(place.key for place in self.places)

    @property
    def exact(self) -> bool:
        """Whether the losses must be equal to the last bit: no layout ever changes."""
        return len(set(self.places)) == 1

    def __str__(self) -> str:
        kind = "sharded" if self.places[0].distributed else "whole"
        return f"{' -> '.join(map(str, self.places))} ({kind} optimizer)"


@dataclass(frozen=True)
class Task:
    """What the ranks of a launch do for one place or one stop; they do several in turn.

    Attributes:
        place: where.
        source: where the run starts: None for a new one, else the folder of its checkpoints.
        keys: results that come of it: of the saved run (new ones), or of the case.
        steps: to train; their losses are the result.
        save: folder for a checkpoint: before ``steps`` for a new run, after them for a stop of a
            chain; None for none.
    """

    place: Place
    source: str | None
    key: str
    steps: int
    save: str | None

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Task:
        """From plain values."""
        return cls(**{**values, "place": Place(**values["place"])})


def places(world: int, distributed: bool = True) -> list[Place]:
    """All layouts of ``world`` ranks that the model can take, with and without SP."""
    return [
        Place(str(pair.encoders["vision"]), str(pair.language), distributed, sequence_parallel)
        for pair in every_pair(world)
        for sequence_parallel in ((False, True) if pair.language.tp > 1 else (False,))
        if not misfits(pair, replace(_LIMITS, sequence_parallel=sequence_parallel))
    ]


def stage_places(world: int) -> list[Place]:
    """Layouts of ``world`` ranks with pipeline stages or one, virtual ones too, sharded optimizer.

    The encoder's is one of them, TP 1: what it does elsewhere does not depend on stages.
    """
    return [
        Place(str(vision), str(pair.language), True, tied=True, virtual_stages=virtual)
        for pair in every_pair(world, (1, 2, 4))
        for virtual in ((1, 2) if pair.language.pp == MICRO_BATCHES else (1,))
        if (vision := pair.encoders["vision"]).tp == 1
        and not misfits(pair, replace(_LIMITS, language_layers=LAYERS, virtual_stages=virtual))
    ]


def text_places(world: int, distributed: bool, tied: bool) -> list[Place]:
    """All layouts of ``world`` ranks for the language model alone; the untied one with SP."""
    sizes = [size for size in range(1, world + 1) if world % size == 0]
    return [
        Place("", f"tp={tp},pp={pp},dp={dp}", distributed, tp > 1 and not tied, tied)
        for tp, pp, dp in itertools.product(sizes, repeat=3)
        if tp * pp * dp == world
        and _TEXT_HEADS % tp == LAYERS % pp == (BATCH // MICRO_BATCHES) % dp == 0
    ]


def all_cases() -> list[Case]:
    """Every place of a model continued at every other and at itself, either optimizer; chains."""
    worlds, cases = (8, 4, 2, 1), []
    for distributed in (True, False):
        tables = [[p for world in worlds for p in places(world, distributed)]]
        for tied in (False, True):
            tables.append([p for w in worlds for p in text_places(w, distributed, tied)])
        if distributed:
            tables.append([p for w in worlds for p in stage_places(w)])
        cases += [Case(pair) for table in tables for pair in itertools.product(table, repeat=2)]
    return [*cases, *_chains()]


_FAN_IN = ("tp=2,dp=4", "tp=2,cp=2,dp=2")
_FAN_OUT = ("tp=4,dp=2", "tp=1,cp=2,dp=4")
_EQUAL = ("tp=4,dp=2", "tp=4,dp=2")
_CP4 = ("tp=1,dp=8", "tp=2,cp=4,dp=1")
_PLAIN = ("tp=1,dp=8", "tp=1,dp=8")
_WIDE = ("tp=8,dp=1", "tp=4,cp=2,dp=1")
_FOUR = ("tp=2,dp=2", "tp=1,cp=4,dp=1")
_FOUR_TP = ("tp=1,dp=4", "tp=4,dp=1")
_ONE = ("tp=1,dp=1", "tp=1,dp=1")
_FAN_IN_SP = (*_FAN_IN, True)
_EQUAL_SP = (*_EQUAL, True)
_WIDE_SP = (*_WIDE, True)
_FOUR_TP_SP = (*_FOUR_TP, True)
# Every axis of both modules grows and shrinks, each kind of bridge is left and entered, each
# direction of the world size is there; then sequence parallelism, entered, left and kept.
_SHARDED = (
    (_FAN_IN, _FAN_IN),
    (_FAN_IN, _FAN_OUT),
    (_FAN_OUT, _EQUAL),
    (_EQUAL, _CP4),
    (_CP4, _WIDE),
    (_WIDE, _PLAIN),
    (_PLAIN, _FAN_IN),
    (_FAN_IN, _FOUR),
    (_FOUR, _FOUR_TP),
    (_FOUR_TP, _CP4),
    (_ONE, _FAN_OUT),
    (_WIDE, _ONE),
    (_FAN_IN_SP, _FAN_IN_SP),
    (_FAN_IN_SP, _FAN_OUT),
    (_FAN_IN, _FAN_IN_SP),
    (_FAN_IN_SP, _FOUR_TP_SP),
)
_WHOLE = (
    (_FAN_IN, _FAN_OUT),
    (_CP4, _FOUR_TP),
    (_ONE, _FAN_IN),
    (_FAN_OUT, _FAN_OUT),
    (_FAN_OUT, _WIDE_SP),
)

_PP4 = "tp=1,pp=4,dp=1"
_DP4 = "tp=1,pp=1,dp=4"
_TP4 = "tp=4,pp=1,dp=1"
_DP2_TP2 = "tp=2,pp=1,dp=2"
_DP2_PP2 = "tp=1,pp=2,dp=2"
_TP2_PP2 = "tp=2,pp=2,dp=1"
_DP2_TP2_PP2 = "tp=2,pp=2,dp=2"
_ALONE = "tp=1,pp=1,dp=1"
# (layouts, whether tied, whether the optimizer is sharded): pipelines kept, changed, entered and
# left, tied and untied, either optimizer, and the world size up and down.
_TEXT = (
    ((_PP4, _PP4), False, True),
    ((_PP4, _DP2_PP2), False, True),
    ((_DP2_PP2, _TP2_PP2), False, True),
    ((_DP2_TP2_PP2, _DP4), False, True),
    ((_TP4, _DP2_TP2_PP2), False, True),
    ((_PP4, _DP2_PP2), True, True),
    ((_DP2_TP2_PP2, _PP4, _ALONE, _DP2_TP2_PP2), True, True),
    ((_DP2_TP2_PP2, _DP2_TP2_PP2), True, False),
    ((_DP2_TP2_PP2, _DP2_TP2), True, False),
    ((_DP4, _TP2_PP2), False, False),
)

# The digits model with pipeline stages: kept, made virtual, left, entered, cut otherwise.
_STAGES = ("tp=2,dp=4", "tp=1,cp=2,pp=2,dp=2")
_UNSTAGED = ("tp=1,dp=8", "tp=2,cp=2,dp=2")
_FOUR_STAGES = ("tp=2,dp=2", "tp=1,pp=4,dp=1")
_STAGED_CASES = tuple(
    Case(
        tuple(
            Place(*place, distributed, tied=True, virtual_stages=virtual)
            for place, virtual in places
        )
    )
    for distributed, places in (
        (True, ((_STAGES, 1), (_STAGES, 1))),
        (True, ((_STAGES, 1), (_STAGES, 2))),
        (True, ((_STAGES, 2), (_UNSTAGED, 1))),
        (True, ((_UNSTAGED, 1), (_STAGES, 2))),
        (True, ((_STAGES, 2), (_STAGES, 2))),
        (True, ((_STAGES, 2), (_FOUR_STAGES, 1), (_ONE, 1), (_STAGES, 1))),
        (False, ((_STAGES, 1), (_FOUR_STAGES, 1))),
        (False, ((_UNSTAGED, 1), (_STAGES, 2))),
    )
)

# Vision, language, and whether with sequence parallelism: without, if it is not there.
Name = tuple[str, str] | tuple[str, str, bool]


def _case(names: Iterable[Name], distributed: bool) -> Case:
    places = ((vision, language, distributed, *sp) for vision, language, *sp in names)
    return Case(tuple(Place(*place) for place in places))


def _text_case(layouts: Iterable[str], tied: bool, distributed: bool) -> Case:
    return Case(
        tuple(
            Place("", layout, distributed, axis_sizes(layout)["tp"] > 1 and not tied, tied)
            for layout in layouts
        )
    )


def _chains() -> list[Case]:
    """World size 8 -> 4 -> 1 -> 8, saved again at each stop."""
    return [_case((_FAN_IN, _FOUR, _ONE, _FAN_OUT), distributed) for distributed in (True, False)]


def usual_cases() -> list[Case]:
    """Pairs with the sharded optimizer, some with the whole one, and the chains."""
    sharded = [_case(pair, True) for pair in _SHARDED]
    whole = [_case(pair, False) for pair in _WHOLE]
    text = [_text_case(*case) for case in _TEXT]
    return [*sharded, *whole, *_chains(), *text, *_STAGED_CASES]


def quick_cases() -> list[Case]:
    """The same layout, another one, and a chain; both kinds of optimizer, with SP and without."""
    return [
        _case((_FAN_IN, _FAN_IN), True),
        _case((_FAN_IN, _EQUAL_SP), True),
        _case((_FAN_IN_SP, _FAN_OUT), False),
        _chains()[0],
    ]


SETS = {"quick": quick_cases, "usual": usual_cases, "all": all_cases}


def reference_steps(case: Case) -> int:
    """Steps that the uninterrupted run trains after the save, to compare all of the case with."""
    return HOP_STEPS * (len(case.places) - 2) + NEXT_STEPS


def launches(cases: Iterable[Case]) -> Iterator[list[Task]]:
    """Tasks by launch, in order: each list is for one world size and needs those before it."""
    cases = list(cases)
    needed: dict[Place, int] = {}
    for case in cases:
        first = case.places[0]
        needed[first] = max(needed.get(first, 0), reference_steps(case))
    saves = [Task(p, None, p.key, steps, p.key) for p, steps in needed.items()]
    yield from _by_world(saves)
    # The first stop of all cases, then the second of those that have one, and so on.
    for stop in range(1, max((len(case.places) for case in cases), default=0)):
        yield from _by_world([_stop(case, stop) for case in cases if stop < len(case.places)])


def _stop(case: Case, stop: int) -> Task:
    last = stop == len(case.places) - 1
    return Task(
        place=case.places[stop],
        source=case.places[0].key if stop == 1 else f"{case.key}.{stop - 1}",
        key=case.key if last else f"{case.key}.{stop}",
        steps=NEXT_STEPS if last else HOP_STEPS,
        save=None if last else f"{case.key}.{stop}",
    )


def _by_world(tasks: list[Task]) -> Iterator[list[Task]]:
    """One list per world size, tasks of a place together: its model is built once."""
    tasks = sorted(tasks, key=lambda task: (-task.place.world, task.place))
    for _, group in itertools.groupby(tasks, key=lambda task: task.place.world):
        yield list(group)
