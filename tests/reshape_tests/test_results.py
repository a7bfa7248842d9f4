# SPDX-License-Identifier: Apache-2.0
"""What is made of losses: verdicts, the file of results, the summary. One process, no ranks."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from tests.reshape import __main__ as command
from tests.reshape import results as known
from tests.reshape.plan import Case, Place, launches
from tests.reshape.results import TOLERANCE, Results, Verdict, compare

ONE = Place("tp=1,dp=1", "tp=1,dp=1", True)
TWO = Place("tp=1,dp=2", "tp=2,dp=1", True)
LOSSES = [3.5, 3.25, 3.0, 2.75, 2.5]


def test_equal_losses_pass() -> None:
    assert compare(LOSSES, LOSSES, exact=True) == Verdict("PASS", 0.0)


def test_the_last_bit_fails_where_nothing_changed_and_passes_elsewhere() -> None:
    close = [*LOSSES[:4], 2.5 * (1 + 1e-7)]
    assert compare(close, LOSSES, exact=True).status == "FAIL"
    assert compare(close, LOSSES, exact=False).status == "PASS"


def test_a_difference_is_reported_with_its_step() -> None:
    far = [*LOSSES[:3], 2.75 * (1 + 2 * TOLERANCE), 2.5]
    verdict = compare(far, LOSSES, exact=False)
    assert verdict.status == "FAIL"
    assert verdict.worst == pytest.approx(2 * TOLERANCE)
    assert verdict.reason.startswith("loss 4 after the checkpoint is 2.75001")
    assert "uninterrupted it is 2.75;" in verdict.reason


@pytest.mark.parametrize(
    "found", [[], LOSSES[:4], [*LOSSES, 2.0], [float("nan")] * 5, [*LOSSES[1:], 2.25]]
)
def test_what_is_no_continuation_fails(found: list[float]) -> None:
    assert compare(found, LOSSES, exact=False).status == "FAIL"


@pytest.fixture
def results(tmp_path: Path) -> Results:
    return Results(tmp_path, "mark")


def test_a_case_is_judged_by_all_of_its_losses(results: Results) -> None:
    chain = Case((ONE, TWO, ONE))
    assert results.judge(chain).status == "missing"
    results.add(ONE.key, losses=[4.0, 3.75, *LOSSES])
    results.add(f"{chain.key}.1", losses=[4.0, 3.75])
    results.read()
    assert results.judge(chain).status == "missing"
    results.add(chain.key, losses=LOSSES)
    assert results.read() == [chain.key]
    assert results.judge(chain) == Verdict("PASS", 0.0)
    results.add(f"{chain.key}.1", losses=[4.0, 3.7])
    results.read()
    assert "loss 2 after the checkpoint" in results.judge(chain).reason


def test_an_error_anywhere_fails_the_case(results: Results) -> None:
    case = Case((ONE, TWO))
    results.add(ONE.key, error="rank 0: no\nTraceback")
    results.read()
    assert results.judge(case) == Verdict("FAIL", reason="rank 0: no")
    results.forget_failures()
    assert results.judge(case).status == "missing"


def test_results_are_kept_for_the_same_code_only(tmp_path: Path) -> None:
    Results(tmp_path, "mark").add("key", losses=[1.0])
    assert Results(tmp_path, "mark").by_key == {"key": {"losses": [1.0]}}
    assert Results(tmp_path, "other").by_key == {}
    assert Results(tmp_path, "mark").by_key == {}  # the file is the other's now


def test_a_line_cut_short_is_no_result_and_spoils_no_other(tmp_path: Path) -> None:
    results = Results(tmp_path, "mark")
    with results.path.open("a") as file:
        file.write('{"key": "a", "los')
    assert results.read() == []
    results.add("b", losses=[1.0])
    assert results.read() == ["b"]
    with results.path.open("a") as file:
        file.write('{"key": "a", "los')
    again = Results(tmp_path, "mark")
    with again.path.open("a") as file:  # as ranks do
        file.write('{"key": "c", "losses": [2.0]}\n')
    assert again.read() == ["c"]
    assert set(again.by_key) == {"b", "c"}


def test_a_task_is_done_when_its_checkpoint_is_there(results: Results, tmp_path: Path) -> None:
    task = next(launches([Case((ONE, TWO))]))[0]
    results.add(task.key, losses=LOSSES)
    results.read()
    assert not results.is_done(task, tmp_path)
    (tmp_path / task.save / "step_00000002").mkdir(parents=True)
    assert results.is_done(task, tmp_path)


def test_the_summary_counts_and_names_what_is_missing(tmp_path: Path) -> None:
    verdicts = {
        Case((ONE, TWO)): Verdict("PASS", 2e-7),
        Case((TWO, ONE)): Verdict("FAIL", 1e-3, "loss 1 …"),
        Case((TWO, TWO)): Verdict("missing"),
    }
    known.write_summary(tmp_path / "summary.json", verdicts, "usual", 1.0)
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["passed"], summary["failed"], summary["missing"]) == (1, 1, 1)
    assert summary["worst"] == 1e-3
    assert [case["status"] for case in summary["cases"]] == ["PASS", "FAIL", "missing"]
    table = io.StringIO()
    known.print_table(verdicts, table)
    assert table.getvalue().index("PASS") < table.getvalue().index("FAIL")


def test_the_fingerprint_follows_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "megatron" / "a.py"
    file.parent.mkdir()
    file.write_text("1")
    monkeypatch.setattr(known, "ROOT", tmp_path)
    before = known.fingerprint()
    assert known.fingerprint() == before
    file.write_text("2")
    assert known.fingerprint() != before


def test_an_interrupted_command_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def interrupted(_: command.Command) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command.Command, "run", interrupted)
    assert command.main(["--quick", "--out", str(tmp_path)]) == 130
    assert "interrupted; run it again to continue" in capsys.readouterr().out
