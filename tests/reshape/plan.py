# SPDX-License-Identifier: Apache-2.0
"""Which runs are saved, which continue them, and in which launches: no torch, no processes.

A *case* is a pair of places: a run saved at one, continued at the other. All runs of a world size
are saved in one launch, and continued in another: the reader of a checkpoint is never the process
that wrote it. A *chain* goes through several world sizes and saves again at each.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "mimo" / "digits"
if str(EXAMPLE) not in sys.path:
    sys.path.insert(0, str(EXAMPLE))

from layouts import Layout, Limits, every_pair, misfits  # noqa: E402

BATCH = 16
# The model of tests/unit_tests/mimo/digits_runs.py: 8 vision heads, 4 key/value heads.
_LIMITS = Limits(global_batch_size=BATCH, vision_heads=8, language_heads=4)
# Steps before the save: two, so that Adam's moments and step count are not those of the first.
SAVED_STEPS = 2
NEXT_STEPS = 5
# A chain trains this many steps at each stop but the last, where it trains NEXT_STEPS.
HOP_STEPS = 2


@dataclass(frozen=True, order=True)
class Place:
    """Layouts of a run.

    Attributes:
        vision, language: as the job's options take them, "tp=2,dp=4".
        distributed: the optimizer's state is sharded over DP.
    """

    vision: str
    language: str
    distributed: bool

    @property
    def world(self) -> int:
        """Ranks of the run."""
        return Layout.parse(self.vision, "vision").size

    @property
    def key(self) -> str:
        """Name for files: ``v-tp2-dp4_l-tp2-cp2-dp2_sharded``."""
        kind = "sharded" if self.distributed else "whole"
        text = f"v-{self.vision}_l-{self.language}_{kind}"
        return re.sub(r"=", "", text).replace(",", "-")

    def __str__(self) -> str:
        return f"{self.vision} | {self.language}"


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
    """All layouts of ``world`` ranks that the model can take."""
    fitting = (pair for pair in every_pair(world) if not misfits(pair, _LIMITS))
    return [Place(str(pair.vision), str(pair.language), distributed) for pair in fitting]


def all_cases() -> list[Case]:
    """Every place continued at every other and at itself, optimizer sharded and whole; chains."""
    cases = []
    for distributed in (True, False):
        table = [p for world in (8, 4, 2, 1) for p in places(world, distributed)]
        cases += [Case(pair) for pair in itertools.product(table, repeat=2)]
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
# Every axis of both modules grows and shrinks, each kind of bridge is left and entered, and each
# direction of the world size is there.
_DOZEN = (
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
)
_WHOLE = ((_FAN_IN, _FAN_OUT), (_CP4, _FOUR_TP), (_ONE, _FAN_IN), (_FAN_OUT, _FAN_OUT))


def _case(names: Iterable[tuple[str, str]], distributed: bool) -> Case:
    return Case(tuple(Place(*name, distributed) for name in names))


def _chains() -> list[Case]:
    """World size 8 -> 4 -> 1 -> 8, saved again at each stop."""
    return [_case((_FAN_IN, _FOUR, _ONE, _FAN_OUT), distributed) for distributed in (True, False)]


def usual_cases() -> list[Case]:
    """A dozen pairs with the sharded optimizer, some with the whole one, and the chains."""
    sharded = [_case(pair, True) for pair in _DOZEN]
    return [*sharded, *(_case(pair, False) for pair in _WHOLE), *_chains()]


def quick_cases() -> list[Case]:
    """The same layout, another one, and a chain; both kinds of optimizer."""
    return [
        _case((_FAN_IN, _FAN_IN), True),
        _case((_FAN_IN, _FAN_OUT), True),
        _case((_FAN_IN, _FAN_OUT), False),
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
