# SPDX-License-Identifier: Apache-2.0
"""Peaks are planned as high as they are counted, hardly higher; a plan that forgets is noticed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from benchmarks.plan_memory import BOUND, CASES, Case, cell, counted
from megatron.core.models.mimo.plan.candidates import Candidate
from megatron.core.models.mimo.plan.footprint import Peaks, peaks
from mimo_colocated.launch.layouts import Layout
from tests.unit_tests.mimo.plan.plan_cases import H100, SMALL, SMALL_WORK


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["layers again", "language model frozen"])
def test_a_step_is_planned_as_it_is_counted(name: str) -> None:
    case = next(each for each in CASES if each.name == name)
    of_others = torch.ones(2**20)  # a test before this one may have left as much
    found = counted(case)
    assert of_others.all()
    assert cell(case, found)["passed"], cell(case, found)
    # The controls: what is kept when nothing is computed again, and when everything trains.
    plain = Case(name, replace(case.options, recompute="none", freeze=""))
    assert not cell(plain, found)["passed"]


def test_verdicts() -> None:
    case = CASES[0]
    said = case.predicted()
    assert cell(case, said)["passed"]
    for factor in (1.01, 1 / (1 + 2 * BOUND)):
        assert not cell(case, replace(said, language=said.language * factor))["passed"]
    # A module whose pass back nothing shows is not compared.
    none = cell(case, Peaks(0, said.language, said.whole))
    assert none["encoder_MiB"] is None
    assert none["passed"]
    assert len(CASES) >= 8


def test_stages_have_no_peaks_of_modules() -> None:
    staged = Candidate(Layout(pp=2, dp=4), {"vision": Layout(dp=8)}, 2)
    with pytest.raises(ValueError, match="peaks of modules are of one stage, got pp=2"):
        peaks(staged, SMALL, SMALL_WORK, H100)
