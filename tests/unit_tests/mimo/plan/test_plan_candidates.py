# SPDX-License-Identifier: Apache-2.0
"""Which pairs are tried, why others cannot run, and that the search is quick at 16,384 ranks."""

from __future__ import annotations

import itertools
import re
import resource
import sys
import time
from dataclasses import replace

import pytest

from megatron.core.models.mimo.memory.policy import EncoderMemory
from megatron.core.models.mimo.plan.candidates import Candidate, Search, candidates, problem
from megatron.core.models.mimo.plan.estimates import estimate, find, moved, policies
from megatron.core.models.mimo.plan.shapes import LanguageShape, Shapes, Stack, Work
from mimo_colocated.launch.layouts import Layout
from tests.unit_tests.mimo.plan.plan_cases import (
    CUT,
    H100,
    SHAPES,
    SMALL,
    SMALL_WORK,
    WORK,
    planned,
)

# Nothing of Megatron-Core is in them.
pytestmark = pytest.mark.once

EIGHT = Search(ranks=8, node=8)


def test_every_pair_that_can_run_is_tried_once() -> None:
    """Against all sizes of all axes, each asked alone."""
    found = [str(each) for each in candidates(SMALL, SMALL_WORK, EIGHT)]
    sizes = (1, 2, 4, 8)
    every = set()
    for tp, cp, pp, dp in itertools.product(sizes, repeat=4):
        if tp * cp * pp * dp != 8:
            continue
        for count, virtual, encoder in itertools.product((1, 2), (1, 2, 4), (None, 1, 2, 4)):
            m, rest = divmod(SMALL_WORK.samples, dp * count)
            if not m or rest:
                continue
            encoders = {} if encoder is None else {"vision": Layout(encoder, dp=8 // encoder)}
            each = Candidate(Layout(tp, cp, dp, 1, tp, pp), encoders, m, virtual)
            if problem(each, SMALL, SMALL_WORK) is None:
                every.add(str(each))
    assert len(found) == len(set(found))
    assert set(found) == every
    assert any("virtual-stages 2" in each for each in found)


def test_cp_of_encoders_that_can_cut_their_items() -> None:
    search = replace(EIGHT, encoder_cp=(1, 2, 4))
    assert list(candidates(SMALL, SMALL_WORK, search)) == list(candidates(SMALL, SMALL_WORK, EIGHT))
    found = list(candidates(CUT, SMALL_WORK, search))
    assert len(found) == len({str(each) for each in found})
    alone = [each for each in found if each.homogeneous or each.encoder("vision").cp == 1]
    assert alone == list(candidates(CUT, SMALL_WORK, EIGHT))
    encoders = {each.encoder("vision") for each in found if not each.homogeneous}
    # 4 heads.
    every = ((1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1))
    assert encoders == {Layout(tp, cp, 8 // (tp * cp)) for tp, cp in every}
    assert {each.encoder("vision").cp for each in found if each.homogeneous} == {1}
    # Within a node.
    narrow = Search(8, 2, encoder_cp=(1, 2, 4))
    encoders = {each.encoder("vision") for each in candidates(CUT, SMALL_WORK, narrow)}
    assert {(at.tp, at.cp) for at in encoders} == {(1, 1), (1, 2), (2, 1)}
    # More ranks than images are of use, and without CP there is no way.
    few = replace(SMALL_WORK, shares={"vision": 0.0625}, samples=4)
    one = Candidate(Layout(tp=4, dp=2), {"vision": Layout(tp=2, cp=2, dp=2)}, 1)
    assert problem(one, CUT, few) is None
    assert problem(one, SMALL, few) == (
        "vision has cp=2, but its encoder does not cut inputs over CP, and cp must be 1"
    )
    assert "tp=4 * cp=2 does not divide its 4 attention heads" in str(
        problem(replace(one, encoders={"vision": Layout(tp=4, cp=2)}), CUT, few)
    )
    gather = replace(one, bridge="gather")
    assert problem(gather, CUT, few) == "gather takes whole items, got vision cp=2; plan routed"


def test_narrower_searches() -> None:
    narrow = Search(8, 2, replica_samples=(1,), stages=(2,))
    found = list(candidates(SMALL, SMALL_WORK, narrow))
    assert found
    for each in found:
        assert each.language.tp <= 2
        assert each.language.pp == 2
        assert each.language.dp * each.microbatches == SMALL_WORK.samples


@pytest.mark.parametrize(
    ("candidate", "why"),
    [
        (Candidate(Layout(dp=8), {"vision": Layout(dp=4)}, 1), "spans 4 ranks.* 8"),
        (Candidate(Layout(dp=8), {"vision": Layout(tp=8)}, 1), "tp=8 does not divide its 4 "),
        (Candidate(Layout(dp=8), {"vision": Layout(dp=8)}, 3), "8 samples do not divide over lang"),
        (Candidate(Layout(tp=2, dp=4), {}, 2, 2), "2 virtual stages need language pp above 1"),
        (Candidate(Layout(tp=2, dp=2, pp=2), {}, 1, 2), "microbatches that pp=2 divides, got 1"),
        (Candidate(Layout(pp=8), {}, 8), "pp=8 does not divide its 4 layers"),
        (Candidate(Layout(tp=8), {}, 8), "tp=8 does not divide its 4 key/value heads"),
    ],
)
def test_why_a_candidate_cannot_run(candidate: Candidate, why: str) -> None:
    found = problem(candidate, SMALL, SMALL_WORK)
    assert found is not None
    assert re.search(why, found)
    with pytest.raises(ValueError, match=f"cannot run: .*{why}"):
        estimate(candidate, SMALL, SMALL_WORK, H100)


def test_more_replicas_than_items() -> None:
    work = replace(SMALL_WORK, shares={"vision": 0.0625}, samples=4)
    candidate = Candidate(Layout(tp=2, dp=4), {"vision": Layout(dp=8)}, 1)
    assert "dp=8 has more replicas than a microbatch has items, 4" in str(
        problem(candidate, SMALL, work)
    )


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("microbatches", 0, "microbatches must be 1 or more, got 0"),
        ("virtual_stages", 0, "virtual_stages must be 1 or more, got 0"),
        ("recompute", "some", r"recompute must be one of \('none', 'selective', 'full'\), got 'so"),
        ("bridge", "ferry", r"bridge must be one of \('routed', 'gather'\), got 'ferry'"),
    ],
)
def test_wrong_fields(field: str, value: object, message: str) -> None:
    fields = {"language": Layout(), "encoders": {}, "microbatches": 1, field: value}
    with pytest.raises(ValueError, match=message):
        Candidate(**fields)


def test_a_candidate_as_options() -> None:
    each = Candidate(
        Layout(tp=2, dp=4), {"vision": Layout(dp=8)}, 2, recompute="full",
        memory=EncoderMemory("offload", "recompute"),
    )  # fmt: skip
    assert str(each) == (
        "--vision tp=1,dp=8 --language tp=2,dp=4 --micro-batches 2 --recompute full "
        "--encoder-memory offload --projector-memory recompute"
    )


def test_the_fastest_that_fits_is_first() -> None:
    found = planned(SHAPES, WORK, H100, Search(32, 8))
    times = [each.seconds.total for each in found.colocated]
    assert times == sorted(times)
    assert all(each.fits for each in found.colocated + found.homogeneous)
    assert not any(each.fits for each in found.rejected)
    best, other = found.colocated[0], found.homogeneous[0]
    assert not best.candidate.homogeneous
    assert other.candidate.homogeneous
    assert found.gain == pytest.approx(other.seconds.total / best.seconds.total - 1)
    assert found.gain > 0.05
    assert best.to_dict()["seconds"]["total"] == best.seconds.total
    assert best.to_dict()["bytes"]["total"] <= H100.memory


def test_what_does_not_fit_gets_a_policy() -> None:
    """The cheapest with which it fits; what no policy saves is rejected."""
    small = replace(H100, memory=50e9)
    found = planned(SHAPES, WORK, small, Search(32, 8))
    saved = [
        each
        for each in found.colocated
        if (each.candidate.recompute, each.candidate.memory) != ("none", EncoderMemory())
    ]
    assert len(saved) > 20
    for each in saved[::7]:
        plain = replace(each.candidate, recompute="none", memory=EncoderMemory())
        assert not estimate(plain, SHAPES, WORK, small).fits
        for other in policies(plain, SHAPES, EIGHT):
            tried = estimate(other, SHAPES, WORK, small)
            assert not tried.fits or tried.seconds.total >= each.seconds.total
    assert found.rejected
    nothing = planned(SHAPES, WORK, replace(H100, memory=1e9), Search(32, 8))
    assert not nothing.colocated
    assert nothing.gain is None


def test_policies_that_are_not_wanted() -> None:
    kept = replace(Search(32, 8), encoder_memory=("keep",))
    found = planned(SHAPES, WORK, replace(H100, memory=50e9), kept)
    assert {each.candidate.memory for each in found.colocated} == {EncoderMemory()}
    with pytest.raises(ValueError, match=r"encoder_memory must be one or more of .*'drop'"):
        Search(32, 8, encoder_memory=("drop",))


def test_no_layout_at_all() -> None:
    with pytest.raises(ValueError, match="no layout of 7 ranks can run 4 samples of 65536 tokens"):
        planned(SHAPES, WORK, H100, Search(7, 8))


def test_text_alone_has_no_homogeneous_way() -> None:
    shapes = Shapes(SHAPES.language, {})
    found = planned(shapes, Work(65_536, 4, {}), H100, Search(32, 8))
    assert found.colocated
    assert not found.homogeneous
    assert len(list(policies(found.colocated[0].candidate, shapes, EIGHT))) == 2


def test_experts_are_shared_out() -> None:
    stack = Stack(4, 256, 512, 8, 8, 32, experts=8, chosen=2, expert_ffn=128, expert_layers=4)
    shapes = Shapes(LanguageShape(stack, 1000), {})
    search = Search(8, 8, experts=(1, 8))
    found = list(candidates(shapes, Work(64, 8, {}), search))
    assert {each.language.ep for each in found} == {1, 8}


def test_estimates_are_found_by_their_words() -> None:
    found = planned(SMALL, SMALL_WORK, H100, EIGHT)
    every = found.colocated + found.homogeneous
    some = find("--vision tp=1,dp=8 --language tp=2,dp=4", every)
    assert some
    assert all(each.candidate.encoders["vision"] == Layout(dp=8) for each in some)


def test_16384_ranks_in_ten_seconds_and_a_gigabyte() -> None:
    """CPU seconds of this process, so other processes do not count."""
    work = replace(WORK, samples=2048)
    started, before = time.process_time(), _peak_bytes()
    found = planned(SHAPES, work, H100, Search(16_384, 8))
    traffic = moved(found.colocated[0].candidate, SHAPES, work)
    assert time.process_time() - started < 10
    assert traffic[0].traffic.group <= 64
    assert _peak_bytes() - before < 1e9


def _peak_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def test_two_encoders_each_with_a_layout_of_its_own() -> None:
    """Their times add up, their memory too; all pairs of their layouts are tried."""
    vision = SMALL.encoders["vision"]
    both = Shapes(SMALL.language, {"vision": vision, "audio": vision})
    work = replace(SMALL_WORK, shares={"vision": 0.25, "audio": 0.25})
    found = planned(both, work, H100, EIGHT)
    layouts = {
        tuple(str(at) for at in each.candidate.encoders.values()) for each in found.colocated
    }
    assert {("tp=1,dp=8", "tp=2,dp=4"), ("tp=4,dp=2", "tp=1,dp=8")} <= layouts
    one = Candidate(Layout(dp=8), {"vision": Layout(dp=8)}, 1)
    two = replace(one, encoders={"vision": Layout(dp=8), "audio": Layout(dp=8)})
    half = replace(SMALL_WORK, shares={"vision": 0.25})
    single = estimate(one, SMALL, half, H100)
    double = estimate(two, both, work, H100)
    assert double.seconds.encoder == pytest.approx(2 * single.seconds.encoder)
    assert double.memory.encoder == 2 * single.memory.encoder
    assert [each.encoder for each in moved(two, both, work)] == ["vision", "audio"]
