# SPDX-License-Identifier: Apache-2.0
"""Drawing cases, and judging them: a message that is wrong in any point does not pass."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest

from mimo_colocated import phases
from tests.faults import campaign
from tests.faults.cases import ANY, APART, FULL, LAYOUTS, SIGNALS, WRITES, Case, draw
from tests.faults.journal import Control, Journal, read
from tests.faults.starts import Ended
from tests.faults.stops import checkpoints, trained
from tests.faults.verdict import GRACE_S, Outcome, judge, ranks_of

RANKS = range(8)


def mark(phase, at, step=1, microbatch=0, entered=True):
    return {"phase": phase, "at": at, "step": step, "microbatch": microbatch, "entered": entered}


def call(at, *ranks):
    return {"collective": "all_gather", "at": at, "ranks": list(ranks)}


def control() -> Control:
    trained = [{"event": "start", "at": 0.0}]
    for step in range(3):
        trained += [mark(phases.DATA, step + 0.5), mark(phases.OPTIMIZER, step + 0.75)]
    trained += [mark(phases.SAVE, 2.8), mark(phases.BETWEEN, 2.9)]
    # A load of the run that trains (there is none in truth) is not counted, nor resumed training.
    resumed = [mark(phases.LOAD, 1.0), mark(phases.DATA, 1.5), mark(phases.OPTIMIZER, 2.0)]
    return Control(dict.fromkeys(RANKS, trained), dict.fromkeys(RANKS, resumed))


def test_a_control_run_is_counted():
    done = control()
    assert done.phases() == {phases.DATA, phases.OPTIMIZER, phases.LOAD, phases.SAVE}
    assert done.entries(0, phases.DATA) == 3
    assert done.entries(0, phases.LOAD) == 1
    assert done.seconds(0, phases.DATA) == 0.25
    assert done.span(0, phases.START) == (0.0, 0.45)
    assert done.span(0, ANY) == pytest.approx((0.0, 0.95 * 2.9))


def test_cases_go_through_every_phase_and_signal_and_are_the_seeds():
    controls = {layout.name: control() for layout in LAYOUTS}
    cases = draw(50, 1, controls)
    every = (phases.DATA, phases.OPTIMIZER, phases.LOAD, phases.SAVE, phases.START, ANY)
    wanted = {(phase, signal) for phase in every for signal in SIGNALS}
    wanted |= {(phases.SAVE, fault) for fault in WRITES} | {(phases.START, APART)}
    assert {(case.phase, case.signal) for case in cases[: len(wanted)]} == wanted
    assert all(case.delay == 0 for case in cases if case.signal in WRITES)
    assert {case.rank for case in cases} == set(RANKS)
    assert {case.layout for case in cases} == set(controls)
    assert all(1 <= case.entry <= 3 for case in cases if case.phase == phases.DATA)
    assert {case.delay > 0 for case in cases if case.phase == phases.DATA} == {True, False}
    assert [case.resumes for case in cases] == [case.phase == phases.LOAD for case in cases]
    assert cases == draw(50, 1, controls)
    assert cases != draw(50, 2, controls)


def test_a_journal_is_read_as_it_was_written(tmp_path: Path):
    Journal(tmp_path, 3).write(phase="data", step=2)
    ((event),) = read(tmp_path, 3)
    assert (event["phase"], event["step"]) == ("data", 2)
    assert read(tmp_path, 4) == []


SENTENCE = (
    "rank 3 was killed by SIGKILL in the phase 'bridge forward' of step 2, microbatch 0; ranks 1 "
    "and 2 waited for it in all_gather #17 of the group cp [1-3]; the other 7 ranks were ended"
)


@pytest.fixture
def right(tmp_path: Path) -> Outcome:
    """A case in which everything is as it should be."""
    journal = {rank: [call(1.0, *RANKS)] for rank in RANKS}
    journal[1].append(call(5.0, 1, 2, 3))
    journal[2].append(call(5.1, 1, 2, 3))
    journal[3] += [mark(phases.DATA, 4.0, 2), mark(phases.BRIDGE_FORWARD, 4.5, 2)]
    journal[3].append({"fault": "SIGKILL", "at": 4.9})
    folder = tmp_path / "errors" / "flight_recorder"
    folder.mkdir(parents=True)
    for rank in set(RANKS) - {3}:
        (folder / f"rank_{rank}").write_bytes(pickle.dumps({"entries": []}))
    (folder / "summary.txt").write_text(
        f"{SENTENCE}.\n\nWaiting for it:\n\n  rank 3: the phase 'bridge forward' of step 2\n"
    )
    case = Case(1, "fan-in", "SIGKILL", 3, phases.BRIDGE_FORWARD, 1, 0.4)
    errors = f"error: {SENTENCE}\nwho waits for whom: {folder / 'summary.txt'}\n"
    return Outcome(case, 1, errors, 1.0, [], journal, tmp_path, 10.0)


def test_a_right_case_passes(right: Outcome):
    verdict = judge(right)
    assert verdict.problems == []
    assert (verdict.phase, verdict.call) == (
        phases.BRIDGE_FORWARD,
        "all_gather #17 of the group cp [1-3]",
    )
    result = campaign.result_of(right.case, right, verdict)
    cells = campaign.Faults().row("case-1", result)
    assert cells[:2] == ("case-1", "fan-in")
    assert cells[-2:] == ("PASS", "all_gather #17 of the group cp [1-3]")
    wrong = {**result, "passed": False, "reason": "the place"}
    assert campaign.Faults().row("case-1", wrong)[-2:] == ("FAIL", "the place")


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("rank 3 was killed", "rank 2 was killed", "the message"),
        ("was killed by SIGKILL", "was stopped (SIGSTOP)", "the message"),
        ("bridge forward", "data", "the place"),
        ("of step 2", "of step 1", "the place"),
        ("microbatch 0", "microbatch 1", "the microbatch"),
        ("ranks 1 and 2", "ranks 0 and 2", "rank 0 is said to wait"),
        ("cp [1-3]", "cp [1, 2]", "which is not in it"),
        ("; the other 7 ranks were ended", "", "the message"),
        ("error:", "error: once\nerror:", "not one message"),
        ("error:", "Traceback (most recent call last)\nerror:", "not one message"),
    ],
)
def test_a_message_that_is_wrong_fails(right: Outcome, old: str, new: str, problem: str):
    problems = judge(replace(right, errors=right.errors.replace(old, new))).problems
    assert any(problem in each for each in problems), problems


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"code": None}, "hung"),
        ({"code": 0}, "exit code 0"),
        ({"seconds": GRACE_S + 1}, "ended after"),
        ({"seconds": -1.0}, "did not happen"),
        ({"left": ["4711"]}, "left behind: processes 4711"),
    ],
)
def test_a_job_that_ends_wrongly_fails(right: Outcome, change: dict, problem: str):
    problems = judge(replace(right, **change)).problems
    assert any(problem in each for each in problems), problems


def test_files_that_are_missing_fail(right: Outcome):
    folder = right.out / "errors" / "flight_recorder"
    (folder / "rank_5").unlink()
    assert any("dumps were saved of" in each for each in judge(right).problems)
    (folder / "summary.txt").write_text("nothing")
    problems = judge(right).problems
    assert any("does not say what the message says" in each for each in problems)
    assert any("lacks who waits" in each for each in problems)


def test_a_mark_that_races_with_the_fault_may_be_the_place_or_not(right: Outcome):
    right.journal[3][-1:] = [mark(phases.LANGUAGE_FORWARD, 4.895, 2), right.journal[3][-1]]
    assert judge(right).problems == []
    right.journal[3][-2]["at"] = 4.8  # long enough before
    assert any("the place" in each for each in judge(right).problems)


def test_the_figures_of_the_page(right: Outcome, tmp_path: Path):
    result = campaign.result_of(right.case, right, judge(right))
    text = campaign.figures([result, {**result, "passed": False}], 1, 10.0)
    assert "1 of 2 cases pass, seed 1" in text
    assert "| bridge forward | 1 of 2 |  |  |  |  | 1.0 s |  |  |  |  | fan-in |" in text
    page = Path(campaign.ROOT / campaign.DOCS).read_text()
    assert page.count(campaign.DOC_START) == page.count(campaign.DOC_END) == 1


def stopped_at_2(tmp_path: Path, fault: str) -> Outcome:
    """A case that nobody was lost by, with everything as it should be."""
    folder = tmp_path / "checkpoints" / "step_00000002"
    folder.mkdir(parents=True)
    files = {"__0_0.distcp": {"bytes": 3, "sha256": None}}
    (folder / "__0_0.distcp").write_bytes(b"abc")
    (folder / "mimo.json").write_text(json.dumps({"files": files}))
    line = {"step": 1, "loss": 0.5, "grad_norm": 1.0, "counted_tokens": 8, "learning_rate": 0.1}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    agreed = [{"agreed": done, "at": at} for done, at in ((0, 1.0), (1, 3.0), (2, 5.0), (3, 7.0))]
    fault_at = {"fault": fault, "at": 4.0}
    said = (
        f"stopped by SIGTERM after step 2 of 4, which is saved in {folder}; the same command goes "
        "on from there\n"
    )
    error = (
        f"error: rank 3 could not write checkpoint {tmp_path}/step_00000004: the disk is full (No "
        "space left on device); make room there and resume; training stopped after step 4\n"
    )
    stops = fault == "SIGTERM"
    return Outcome(
        Case(1, "fan-in", fault, 3, phases.SAVE, 2, 0.0),
        code=75 if stops else 1,
        errors="" if stops else error,
        seconds=1.0,
        left=[],
        journal={3: [*agreed[:2], fault_at, *agreed[2:]]},
        out=tmp_path,
        timeout=10.0,
        output="step 2\n" + said * stops,
        checkpoints=checkpoints(tmp_path),
        again=Ended(0, 0.0, "", []),
        trained=trained(tmp_path),
    )


@pytest.mark.parametrize("fault", ["SIGTERM", FULL])
def test_a_job_that_loses_nothing_passes(tmp_path: Path, fault: str):
    assert judge(stopped_at_2(tmp_path, fault)).problems == []


@pytest.mark.parametrize("fault", ["SIGTERM", FULL])
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"code": None}, "hung"),
        ({"code": 0}, "exit code 0"),
        ({"code": -15}, "exit code -15"),
        ({"errors": "error: something else\n"}, "error"),
        ({"seconds": GRACE_S + 1}, "ended after"),
        ({"left": ["4711"]}, "left behind"),
        ({"checkpoints": {}}, "the newest checkpoint is step_00000000, not that of step 2"),
        ({"checkpoints": {"step_00000002": "is cut short"}}, "step_00000002 is cut short"),
        ({"checkpoints": {".saving_00000004": "", "step_00000002": ""}}, "is no checkpoint"),
        ({"again": Ended(1, 0.0, "error: no", [])}, "run again: (1, 'error: no')"),
        ({"again": None}, "run again: None"),
        ({"trained": [(1, 0.5000001, 1.0, 8, 0.1)]}, "undisturbed"),
    ],
)
def test_a_job_that_loses_something_fails(tmp_path: Path, fault: str, change: dict, problem: str):
    problems = judge(replace(stopped_at_2(tmp_path, fault), **change)).problems
    assert any(problem in each for each in problems), problems


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("after step 2", "after step 1", "stopped after step 1, not after 2 or 3"),
        ("step_00000002", "step_00000001", "the checkpoint is said to be"),
        ("stopped by SIGTERM", "stopped by SIGUSR1", "the last line"),
    ],
)
def test_a_stop_that_is_said_wrongly_fails(tmp_path: Path, old: str, new: str, problem: str):
    right = stopped_at_2(tmp_path, "SIGTERM")
    problems = judge(replace(right, output=right.output.replace(old, new))).problems
    assert any(problem in each for each in problems), problems


def test_a_job_may_end_well_if_it_is_told_to_stop_too_late(tmp_path: Path):
    late = replace(stopped_at_2(tmp_path, "SIGTERM"), code=0)
    late.journal[3].append({"fault": "SIGTERM", "at": 8.0})
    del late.journal[3][2]
    assert judge(late).problems == []


def test_what_is_wrong_with_a_checkpoint_is_found(tmp_path: Path):
    folder = stopped_at_2(tmp_path, FULL).out / "checkpoints"
    assert checkpoints(tmp_path) == {"step_00000002": ""}
    (folder / "step_00000002" / "__0_0.distcp").write_bytes(b"ab")
    (folder / ".saving_00000004").mkdir()
    assert checkpoints(tmp_path) == {
        ".saving_00000004": "has no manifest",
        "step_00000002": "__0_0.distcp has 2 bytes, 3 were saved",
    }


def apart(tmp_path: Path) -> Outcome:
    """A case in which ranks 4-7 had a folder of their own, and all is as it should be."""
    out = tmp_path / "out"
    right = stopped_at_2(out, FULL)
    error = (
        f"error: ranks 4-7 cannot see the folder {out}/checkpoints of rank 0 (rank 4 looked at "
        f"{tmp_path}/apart on host); all ranks write a checkpoint into one folder: give one\n"
    )
    return replace(
        right, case=replace(right.case, signal=APART, rank=3), errors=error, checkpoints={}
    )


def test_ranks_with_a_folder_of_their_own_have_to_be_named(tmp_path: Path):
    right = apart(tmp_path)
    assert judge(right).problems == []
    wrong = [
        replace(right, code=0),
        replace(right, errors=right.errors.replace("ranks 4-7", "ranks 4-6")),
        replace(right, errors=right.errors.replace("/apart", "/elsewhere")),
        replace(right, checkpoints={"step_00000002": ""}),
        replace(right, again=None),
    ]
    assert all(judge(each).problems for each in wrong)
    (tmp_path / "apart" / ".probe").mkdir(parents=True)
    assert judge(right).problems == ["left in the other folder: .probe"]


def test_ranks_in_words():
    assert ranks_of("0-2, 5 and 7") == [0, 1, 2, 5, 7]
    assert ranks_of("4") == [4]
