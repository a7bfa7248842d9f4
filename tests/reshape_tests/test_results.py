# SPDX-License-Identifier: Apache-2.0
"""What is made of losses: verdicts, what counts of an earlier run. One process, no ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from campaigns.command import main, parse
from tests.reshape.campaign import TOLERANCE, Reshape, compare, judge
from tests.reshape.plan import SETS, Case, Place, launches

ONE = Place("tp=1,dp=1", "tp=1,dp=1", True)
TWO = Place("tp=1,dp=2", "tp=2,dp=1", True)
LOSSES = [3.5, 3.25, 3.0, 2.75, 2.5]


def test_equal_losses_pass() -> None:
    assert compare(LOSSES, LOSSES, exact=True) == {"passed": True, "worst": 0.0, "exact": True}


def test_the_last_bit_fails_where_nothing_changed_and_passes_elsewhere() -> None:
    close = [*LOSSES[:4], 2.5 * (1 + 1e-7)]
    assert compare(close, LOSSES, exact=True)["passed"] is False
    assert compare(close, LOSSES, exact=False)["passed"] is True


def test_a_difference_is_reported_with_its_step() -> None:
    far = [*LOSSES[:3], 2.75 * (1 + 2 * TOLERANCE), 2.5]
    verdict = compare(far, LOSSES, exact=False)
    assert verdict["passed"] is False
    assert verdict["worst"] == pytest.approx(2 * TOLERANCE)
    assert verdict["reason"].startswith("loss 4 after the checkpoint is 2.75001")
    assert "uninterrupted it is 2.75;" in verdict["reason"]


@pytest.mark.parametrize(
    "found", [[], LOSSES[:4], [*LOSSES, 2.0], [float("nan")] * 5, [*LOSSES[1:], 2.25]]
)
def test_what_is_no_continuation_fails(found: list[float]) -> None:
    assert compare(found, LOSSES, exact=False)["passed"] is False


def test_a_case_is_judged_by_all_of_its_losses() -> None:
    chain, known = Case((ONE, TWO, ONE)), {}
    assert judge(chain, known) is None
    known[ONE.key] = {"losses": [4.0, 3.75, *LOSSES]}
    known[f"{chain.key}.1"] = {"losses": [4.0, 3.75]}
    assert judge(chain, known) is None
    known[chain.key] = {"losses": LOSSES}
    assert judge(chain, known) == {"passed": True, "worst": 0.0, "exact": False}
    known[f"{chain.key}.1"] = {"losses": [4.0, 3.7]}
    assert "loss 2 after the checkpoint" in judge(chain, known)["reason"]


def test_an_error_anywhere_fails_the_case() -> None:
    case = Case((ONE, TWO))
    known = {ONE.key: {"passed": False, "reason": "rank 0: no\nTraceback"}}
    assert judge(case, known) == {"passed": False, "reason": "rank 0: no"}


def reshape(out: Path, start: Any = None) -> Reshape:
    made = Reshape(start)
    made.choose(parse(made, ["--quick", "--out", str(out)]))
    return made


def test_a_task_counts_again_when_its_losses_and_its_checkpoint_are_there(tmp_path: Path) -> None:
    task = next(launches(SETS["quick"]()))[0]
    result = {"passed": None, "losses": LOSSES}
    assert not reshape(tmp_path).keeps(task.key, result)
    (tmp_path / "checkpoints" / task.save / "step_00000002").mkdir(parents=True)
    assert reshape(tmp_path).keeps(task.key, result)
    assert not reshape(tmp_path).keeps(task.key, {"passed": False, "reason": "rank 0: no"})


def test_tasks_that_depend_on_a_lost_one_are_judged_and_the_rest_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Launches are scripted: the first case's continuation fails, all others have equal losses."""
    first = SETS["quick"]()[0]

    def start(_world: int, keys: list[str], *_: Any, **__: Any) -> Any:
        for key in keys:
            yield "started", key, {}
            losses = [1.0] * (5 if "__" in key and key[-2:-1] != "." else 2)
            if key in {case.places[0].key for case in SETS["quick"]()}:
                losses = [1.0] * 9
            failed = {"passed": False, "reason": "rank 3: no\nmore"}
            yield "finished", key, failed if key == first.key else {"losses": losses, **PASSED}

    assert main(Reshape(start), ["--quick", "--out", str(tmp_path)]) == 1
    text = capsys.readouterr().out
    assert "FAIL: 3 of 4 cases" in text
    assert f"FAIL  {first}    rank 3: no" in text


PASSED = {"passed": None}
