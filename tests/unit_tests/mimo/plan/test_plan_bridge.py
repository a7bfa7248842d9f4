# SPDX-License-Identifier: Apache-2.0
"""Rows over the bridge: the formula of the search against the route plan that is executed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron.core.models.mimo.comm.plan.gather_layout import BridgeDirection
from megatron.core.models.mimo.plan.bridge import (
    direction,
    gather_rows,
    planned_traffic,
    routed_rows,
)
from megatron.core.models.mimo.plan.candidates import Candidate, Search, problem
from megatron.core.models.mimo.plan.estimates import estimate, moved, plan
from megatron.core.models.mimo.plan.footprint import rank_bytes
from megatron.core.models.mimo.plan.shapes import EncoderShape, Stack, Work
from mimo_colocated.launch.layouts import Layout
from tests.unit_tests.mimo.plan.plan_cases import H100, SHAPES, SMALL, SMALL_WORK, WORK

# Nothing of Megatron-Core is in them.
pytestmark = pytest.mark.once

# 256 rows that fill the sequence: tokens lie evenly whatever the cut.
WHOLE = EncoderShape(Stack.of(1, 32, 64, 4), 4, 4, 48, 32, 64)
FULL = Work(256, 8, {"vision": 1.0})


@pytest.mark.parametrize(
    "encoder",
    [Layout(dp=8), Layout(tp=2, dp=4), Layout(tp=8), Layout(cp=2, dp=4), Layout(tp=2, cp=4)],
)
@pytest.mark.parametrize(
    "language",
    [Layout(cp=2, dp=4), Layout(cp=4, dp=2), Layout(dp=8), Layout(cp=8), Layout(cp=2, pp=2, dp=2)],
)
def test_the_formula_bounds_the_route_plan(encoder: Layout, language: Layout) -> None:
    """It tells what comes to a rank on average; the plan what comes to the busiest one."""
    samples = FULL.samples // language.dp
    traffic = planned_traffic(encoder, language, samples, WHOLE, 64, FULL)
    way, scale = direction(encoder, language)
    rows = routed_rows(way, scale, language.cp, encoder.cp)
    whole = samples * FULL.sequence
    assert traffic.forward + traffic.backward >= float(rows.forward + rows.backward) * whole * 0.49
    if language.pp == 1:
        mean = traffic.total / language.size
        assert mean == pytest.approx(float(rows.forward + rows.backward) * whole, rel=0.35, abs=1)
    assert traffic.own == whole // language.cp
    assert traffic.group * max(1, traffic.total) > 0


def test_equal_replicas_without_cp_move_nothing() -> None:
    traffic = planned_traffic(Layout(dp=8), Layout(dp=8), 1, WHOLE, 64, FULL)
    assert (traffic.total, traffic.sent, traffic.group) == (0, 0, 1)
    candidate = Candidate(Layout(dp=8), {"vision": Layout(dp=8)}, 1)
    assert estimate(candidate, SMALL, SMALL_WORK, H100).seconds.bridge < 1e-3
    assert moved(candidate, SMALL, SMALL_WORK)[0].traffic.total == 0


def test_the_gather_bridge_moves_and_keeps_more() -> None:
    routed = Candidate(Layout(cp=8, dp=4), {"vision": Layout(dp=32)}, 1)
    gather = Candidate(Layout(cp=8, dp=4), {"vision": Layout(dp=32)}, 1, bridge="gather")
    both = [estimate(each, SHAPES, WORK, H100) for each in (routed, gather)]
    assert both[1].seconds.bridge > both[0].seconds.bridge
    kept = [rank_bytes(each, SHAPES, WORK, H100).bridge for each in (routed, gather)]
    assert kept[1] == 8 * kept[0]
    for way in BridgeDirection:
        routes, gathers = routed_rows(way, 2, 4), gather_rows(way, 2, 4)
        assert routes.forward + routes.backward < gathers.forward + gathers.backward


def test_sizes_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="dp=3 of the encoder and dp=2 of the language model do"):
        direction(Layout(dp=3), Layout(dp=2))


def test_what_is_moved_for_every_encoder() -> None:
    candidate = Candidate(Layout(tp=2, cp=8, dp=2), {"vision": Layout(dp=32)}, 2)
    (found,) = moved(candidate, SHAPES, WORK)
    assert found.encoder == "vision"
    assert found.row_bytes == 4096 * 2
    assert found.spread == 1
    assert found.traffic.own == 48 * 1024 // 16
    assert found.traffic.sent <= 48 * 1024


def test_rows_that_go_nowhere_take_no_time() -> None:
    """With equal layouts, each rank's encoder has the rows of its own samples."""
    same = {"vision": Layout(dp=8)}
    work = replace(WORK, samples=8)
    apart = estimate(Candidate(Layout(dp=8), same, 1), SHAPES, work, H100).seconds
    forced = estimate(Candidate(Layout(dp=8), {}, 1), SHAPES, work, H100).seconds
    assert apart.bridge == 0
    assert apart.total == pytest.approx(forced.total)


def test_gather_needs_equal_blocks() -> None:
    odd = Work(61_440, 10, {"vision": 1 / 60})
    for language, encoder, work, said in (
        (Layout(cp=4, dp=2), Layout(dp=8), odd, "gather needs 10 items of a microbatch"),
        (Layout(cp=4, pp=2, dp=4), Layout(dp=32), WORK, "gather is planned without pipeline"),
        (Layout(cp=8, dp=4), Layout(dp=32), WORK, ""),
    ):
        routed = Candidate(language, {"vision": encoder}, 1)
        assert problem(routed, SHAPES, work) is None
        assert (problem(replace(routed, bridge="gather"), SHAPES, work) or "").startswith(said)
        assert bool(problem(replace(routed, bridge="gather"), SHAPES, work)) == bool(said)


def test_a_search_with_gather_bridges() -> None:
    search = Search(ranks=8, node=8, bridge="gather")
    found = plan(shapes=SMALL, work=SMALL_WORK, machine=H100, search=search)
    assert {each.candidate.bridge for each in found.colocated} == {"gather"}
    assert {each.candidate.bridge for each in found.homogeneous} == {"routed"}  # it has none
    over_cp = [each for each in found.colocated if each.candidate.language.cp > 1]
    assert over_cp
    for each in over_cp:
        candidate = each.candidate
        (gathers,) = moved(candidate, SMALL, SMALL_WORK)
        (routes,) = moved(replace(candidate, bridge="routed"), SMALL, SMALL_WORK)
        assert gathers.traffic.total >= routes.traffic.total
