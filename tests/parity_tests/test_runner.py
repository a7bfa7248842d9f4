# SPDX-License-Identifier: Apache-2.0
"""The runner, the table and the exit code, with launches that are scripted. One process."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from campaigns import command
from campaigns.ranks import LaunchFailed
from tests.parity.campaign import Parity

pytestmark = pytest.mark.once

ROWS = ["fan-in-cp2", "fan-out-cp2", "equal-cp1"]
PASS = {
    "passed": True,
    "seconds": 1.5,
    "checks": [{"kind": "gradients", "where": "a.weight", "error": 2e-7, "allowed": 1e-5}],
}
WRONG = {
    "passed": False,
    "seconds": 1.5,
    "checks": [{"kind": "gradients", "where": "b.weight", "error": 1.0, "allowed": 1e-5}],
}


@dataclass
class Plan:
    """What a launch was started with."""

    world_size: int
    items: tuple[str, ...]
    backend: str


def main(argv: list[str], script: Script) -> int:
    return command.main(Parity(script, {}), argv)


class Script:
    """Launches that report what a table says of each item; what it does not name passes.

    A text ends the launch while the item runs, None leaves the item out.
    """

    def __init__(self, **outcomes: Any) -> None:
        self.outcomes = {name.replace("_", "-"): value for name, value in outcomes.items()}
        self.plans: list[Plan] = []

    def __call__(
        self, world: int, items: Sequence[str], *_: Any, backend: str, **__: Any
    ) -> Iterator[tuple[str, str, Any]]:
        self.plans.append(Plan(world, tuple(items), backend))
        return self.records()

    def records(self) -> Iterator[tuple[str, str, Any]]:
        for item in self.plans[-1].items:
            outcome = self.outcomes.get(item, PASS)
            if outcome is None:
                continue
            yield "started", item, {}
            if isinstance(outcome, str):
                raise LaunchFailed(outcome)
            yield "finished", item, outcome


@pytest.fixture
def suite(tmp_path, capsys, monkeypatch):
    """``suite(script, *arguments)`` -> (exit code, printed text, summary)."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(script: Script, *arguments: str) -> tuple[int, str, dict[str, Any]]:
        argv = ["--layouts", ",".join(ROWS), "--out", str(tmp_path), *arguments]
        code = main(argv, script)
        return code, capsys.readouterr().out, json.loads((tmp_path / "summary.json").read_text())

    return run


def test_all_rows_pass(suite) -> None:
    script = Script()
    code, text, summary = suite(script)
    assert code == 0
    assert [plan.world_size for plan in script.plans] == [1, 8]
    assert script.plans[0].items == (
        "reference-images-32samples-uniform-float32",
        "reference-images-32samples-uneven-float32",
    )
    assert script.plans[1].items == tuple(ROWS)
    assert summary["passed"] == 3
    assert list(summary["results"]) == ROWS
    assert (summary["failed"], summary["missing"]) == ([], [])
    assert "PASS: 3 of 3 rows" in text
    for row in ROWS:  # as it finishes, and in the table
        assert text.count(row) == 2
    assert "2.0e-07 of 1e-05 in gradients: a.weight  (1.5 s)  [1/3, about 0:" in text


@pytest.mark.parametrize(
    "gpus, rows, backend", [(0, "bf16", "gloo"), (4, "bf16", "gloo"), (4, "text-pp4-tied", "nccl")]
)
def test_references_and_rows_share_a_backend(suite, monkeypatch, gpus, rows, backend) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    script = Script()
    suite(script, "--layouts", rows)
    assert [plan.backend for plan in script.plans] == [backend, backend]


def test_nccl_without_enough_gpus_is_refused(tmp_path, capsys) -> None:
    assert main(["--backend", "nccl", "--out", str(tmp_path)], Script()) == 2
    assert "--backend nccl needs a GPU per rank" in capsys.readouterr().err


def test_a_wrong_row_fails_and_names_the_tensor(suite) -> None:
    code, text, summary = suite(Script(fan_out_cp2=WRONG))
    assert code == 1
    assert (summary["passed"], summary["failed"]) == (2, ["fan-out-cp2"])
    assert "FAIL  fan-out-cp2  1.0e+00 of 1e-05 in gradients: b.weight" in text
    assert "FAIL: 2 of 3 rows" in text


def test_a_row_that_crashes_fails_and_the_rest_runs_in_a_fresh_launch(suite) -> None:
    reason = "rank 3 was killed by SIGKILL; the other 7 ranks were ended"
    script = Script(fan_in_cp2=reason)
    code, text, summary = suite(script)
    assert code == 1
    assert [plan.items for plan in script.plans[1:]] == [tuple(ROWS), tuple(ROWS[1:])]
    assert summary["results"]["fan-in-cp2"]["reason"] == reason
    assert [summary["results"][row]["passed"] for row in ROWS] == [False, True, True]
    assert f"FAIL  fan-in-cp2  {reason}" in text


def test_a_row_that_is_left_out_is_a_failure(suite) -> None:
    code, text, summary = suite(Script(equal_cp1=None))
    assert code == 1
    assert summary["failed"] == ["equal-cp1"]
    assert "FAIL  equal-cp1  the launch ended without running it" in text


def test_rows_whose_reference_failed_are_failures_without_a_launch(suite) -> None:
    script = Script(**{"reference-images-32samples-uniform-float32": "out of memory"})
    code, _, summary = suite(script)
    assert code == 1
    assert summary["failed"] == ["fan-in-cp2", "fan-out-cp2"]
    assert summary["results"]["fan-in-cp2"]["reason"] == "its reference failed: out of memory"
    assert script.plans[-1].items == ("equal-cp1",)


def test_a_launch_that_cannot_start_fails_all_its_rows_once(suite) -> None:
    class Broken(Script):
        def records(self) -> Iterator[tuple[str, str, Any]]:
            if self.plans[-1].world_size == 8:
                raise LaunchFailed("no result within 300 s; all ranks were ended")
            yield from super().records()

    script = Broken()
    code, _, summary = suite(script)
    assert code == 1
    assert summary["failed"] == ROWS
    assert [plan.world_size for plan in script.plans] == [1, 8]


def test_a_launch_that_ends_between_two_rows_costs_none(suite) -> None:
    class Brittle(Script):
        def records(self) -> Iterator[tuple[str, str, Any]]:
            for record in super().records():
                yield record
                if record[0] == "finished" and len(self.plans) == 2:
                    raise LaunchFailed("rank 0 ended too early")

    script = Brittle()
    code, text, _ = suite(script)
    assert code == 0
    assert [plan.items for plan in script.plans[1:]] == [tuple(ROWS), tuple(ROWS[1:])]
    assert "the launch of 8 ended early: rank 0 ended too early" in text


def test_a_row_without_a_result_is_missing_in_the_table(suite, monkeypatch) -> None:
    monkeypatch.setattr(Parity, "run", lambda *_: (each for each in ()))
    code, text, summary = suite(Script())
    assert code == 1
    assert summary["missing"] == ROWS
    assert text.count("missing: it has no result") == 3


def test_nightly_keeps_passed_rows_and_runs_failed_ones_again(suite) -> None:
    suite(Script(equal_cp1=WRONG), "--nightly")
    script = Script()
    code, text, summary = suite(script, "--nightly")
    assert code == 0
    assert [plan.items for plan in script.plans] == [
        ("reference-images-32samples-uneven-float32",),
        ("equal-cp1",),
    ]
    assert "2 kept from" in text
    assert list(summary["results"]) == ROWS
    again = Script()
    assert suite(again, "--nightly")[0] == 0
    assert again.plans == []


@pytest.mark.parametrize("change", ["--fresh", "--train-steps=4", "--thresh=1e-3"])
def test_nightly_keeps_nothing_when_asked_or_of_other_options(suite, change) -> None:
    suite(Script(), "--nightly")
    script = Script()
    suite(script, "--nightly", change)
    assert script.plans[-1].items == tuple(ROWS)


def test_nightly_keeps_nothing_of_other_code(suite, monkeypatch) -> None:
    suite(Script(), "--nightly")
    monkeypatch.setattr(Parity, "fingerprint", lambda self: "other code")
    script = Script()
    suite(script, "--nightly")
    assert script.plans[-1].items == tuple(ROWS)


def test_a_torn_line_is_not_believed(suite, tmp_path) -> None:
    suite(Script(), "--nightly")
    text = (tmp_path / "results.jsonl").read_text()
    (tmp_path / "results.jsonl").write_text(text[:-10])
    script = Script()
    assert suite(script, "--nightly")[0] == 0
    assert script.plans[-1].items == tuple(ROWS[-1:])


def test_the_default_set_always_runs_everything(suite) -> None:
    suite(Script())
    script = Script()
    suite(script)
    assert script.plans[-1].items == tuple(ROWS)


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_a_stopped_run_leaves_its_results_and_no_ranks(suite, stop) -> None:
    class Stopped(Script):
        ended = False

        def records(self) -> Iterator[tuple[str, str, Any]]:
            try:
                for record in super().records():
                    if record[:2] == ("started", "fan-out-cp2"):
                        os.kill(os.getpid(), stop)
                    yield record
            finally:
                self.ended = True

    script = Stopped()
    code, _, summary = suite(script)
    assert code == 130
    assert script.ended
    assert (list(summary["results"]), summary["missing"]) == (ROWS[:1], ROWS[1:])


def test_a_bad_row_name_is_one_sentence_and_writes_nothing(tmp_path, capsys) -> None:
    out = tmp_path / "new"
    assert main(["--layouts", "tp3", "--out", str(out)], Script()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: LAYOUTS names 'tp3', which is no row")
    assert error.count("\n") == 1
    assert not out.exists()


def test_the_page_has_the_table_and_the_bounds_of_this_run(suite, tmp_path) -> None:
    path = tmp_path / "docs" / "parity.md"
    suite(Script(fan_out_cp2=WRONG), "--docs", str(path), "--thresh", "2e-3")
    page = path.read_text()
    assert "2 of 3 rows pass." in page
    passed = "| PASS | 2.0e-07 | 1e-05 | gradients: a.weight |"
    assert f"| fan-in-cp2 | TP2 DP4 | TP2 CP2 DP2 | 1 mb, uniform {passed}" in page
    assert "| FAIL | 1.0e+00 | 1e-05 | gradients: b.weight |" in page
    assert "| logits | output of the first step's samples | 2e-03 | 3e-02 |" in page
    assert "| initial weights | every weight before the first step | 0, bit-exact |" in page
