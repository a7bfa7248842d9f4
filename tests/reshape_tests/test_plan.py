# SPDX-License-Identifier: Apache-2.0
"""Which cases and launches there are: pure."""

from __future__ import annotations

import itertools

import pytest

from tests.reshape.plan import (
    HOP_STEPS,
    NEXT_STEPS,
    SETS,
    Case,
    Place,
    Task,
    launches,
    places,
    reference_steps,
    stage_places,
    text_places,
)

ONE = Place("tp=1,dp=1", "tp=1,dp=1", True)
TWO = Place("tp=1,dp=2", "tp=2,dp=1", True)


def tables(distributed: bool) -> list[list[Place]]:
    """All places of each model."""
    worlds = (1, 2, 4, 8)
    images = [place for world in worlds for place in places(world, distributed)]
    texts = [
        [place for world in worlds for place in text_places(world, distributed, tied)]
        for tied in (False, True)
    ]
    stages = [[place for world in worlds for place in stage_places(world)]] if distributed else []
    return [images, *texts, *stages]


@pytest.mark.parametrize("name", list(SETS))
def test_cases_are_distinct_and_keep_the_optimizer_s_kind(name: str) -> None:
    cases = SETS[name]()
    assert len(set(cases)) == len({case.key for case in cases}) == len(cases)
    assert all(len({place.distributed for place in case.places}) == 1 for case in cases)
    assert all(len({place.model for place in case.places}) == 1 for case in cases)
    fitting = set(itertools.chain.from_iterable(tables(True) + tables(False)))
    # Of places with stages the table of all pairs is a part: one encoder layout, one optimizer.
    rest = {p for case in cases for p in case.places if p.model != "images-tied"}
    assert rest <= fitting
    # Files are named after keys, with room for a stop's number and a temporary suffix.
    assert max(len(case.key) for case in cases) < 240


def test_all_is_every_pair() -> None:
    pairs = {case.places for case in SETS["all"]() if len(case.places) == 2}
    for table in tables(True) + tables(False):
        assert set(itertools.product(table, repeat=2)) <= pairs
    languages = {place.language for place in tables(True)[1]}
    wanted = "tp=1,pp=1,dp=4 tp=4,pp=1,dp=1 tp=1,pp=4,dp=1 tp=2,pp=1,dp=2 tp=1,pp=2,dp=2"
    assert {*wanted.split(), "tp=2,pp=2,dp=1", "tp=2,pp=2,dp=2"} <= languages


@pytest.mark.parametrize("distributed", [True, False])
def test_the_usual_set_changes_every_axis_and_the_world(distributed: bool) -> None:
    cases = [c for c in SETS["usual"]() if c.places[0].distributed is distributed]
    worlds = [[place.world for place in case.places] for case in cases]
    assert [8, 4, 1, 8] in worlds
    assert any(case.exact for case in cases)
    assert {place.sequence_parallel for case in cases for place in case.places} == {True, False}
    if distributed:
        pairs = [case.places for case in cases if len(case.places) == 2]
        assert len(pairs) >= 12
        changes = {(one.sequence_parallel, other.sequence_parallel) for one, other in pairs}
        assert changes == set(itertools.product([False, True], repeat=2))
        steps = {pair for world in worlds for pair in itertools.pairwise(world)}
        assert {(8, 4), (4, 8), (8, 1), (1, 8), (8, 8), (4, 4)} <= steps


def test_only_unchanged_layouts_are_exact() -> None:
    assert Case((ONE, ONE)).exact
    assert not Case((ONE, TWO)).exact
    assert not Case((ONE, TWO, ONE)).exact


@pytest.mark.parametrize("name", list(SETS))
def test_launches_are_of_one_world_and_need_only_earlier_ones(name: str) -> None:
    cases, saved, keys = SETS[name](), {}, []
    for tasks in launches(cases):
        assert len({task.place.world for task in tasks}) == 1
        # Nothing is read by the launch that wrote it.
        assert all(task.source is None or task.source in saved for task in tasks)
        # A model is built once per launch and place.
        runs = [place for place, _ in itertools.groupby(tasks, key=lambda task: task.place)]
        assert len(runs) == len(set(runs))
        saved |= {task.save: task for task in tasks if task.save is not None}
        keys += [task.key for task in tasks]
    assert len(keys) == len(set(keys))
    assert {case.key for case in cases} <= set(keys)
    for case in cases:
        assert saved[case.places[0].key].steps >= reference_steps(case)


def test_a_chain_trains_at_each_stop_and_saves_at_all_but_the_last() -> None:
    chain = Case((ONE, TWO, ONE))
    saved, first, last = (tasks[0] for tasks in launches([chain]))
    assert (saved.source, saved.save) == (None, ONE.key)
    assert (first.source, first.save, first.steps) == (ONE.key, f"{chain.key}.1", HOP_STEPS)
    assert (last.source, last.save, last.steps) == (f"{chain.key}.1", None, NEXT_STEPS)
    assert reference_steps(chain) == HOP_STEPS + NEXT_STEPS
    assert Task.from_dict(last.as_dict()) == last
