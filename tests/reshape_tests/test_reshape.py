# SPDX-License-Identifier: Apache-2.0
"""The small part of ``make reshape``: another layout, both kinds of optimizer, 8 -> 4 -> 1 -> 8.

One run of the command; the tests look at what it printed and left, then run it again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.reshape.plan import SETS

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 500


def reshape(out: Path) -> subprocess.CompletedProcess:
    launched = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    return subprocess.run(
        [sys.executable, "-m", "tests.reshape", "--quick", "--out", str(out)],
        cwd=ROOT,
        env={key: value for key, value in os.environ.items() if key not in launched},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess]:
    out = tmp_path_factory.mktemp("reshape")
    return out, reshape(out)


def test_runs_continue_in_other_layouts(done: tuple) -> None:
    out, command = done
    assert command.returncode == 0, command.stdout + command.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["passed"], summary["failed"], summary["missing"]) == (4, [], [])
    names, cases = list(summary["results"]), list(summary["results"].values())
    assert [case["exact"] for case in cases] == [True, False, False, False]
    assert cases[0]["worst"] == 0.0
    assert all(0.0 < case["worst"] <= summary["tolerance"] for case in cases[1:])
    assert ["whole" in name for name in names] == [False, False, True, False]
    assert names[3].count(" -> ") == 3


def test_each_case_is_told(done: tuple) -> None:
    _, command = done
    for case in SETS["quick"]():
        assert f"PASS  {case}" in command.stdout
    assert "PASS: 4 of 4 cases" in command.stdout


def test_a_second_run_has_nothing_to_do_and_a_lost_result_fails(done: tuple) -> None:
    out, _ = done
    before = (out / "results.jsonl").read_text()
    again = reshape(out)
    assert again.returncode == 0
    assert (out / "results.jsonl").read_text() == before
    assert "8 kept from" in again.stdout
    # Losses of other data or another state are not let through.
    lines = before.splitlines()
    broken = json.loads(lines[-1])
    (result,) = broken.values()
    result["losses"] = [*result["losses"][1:], result["losses"][-1]]
    (out / "results.jsonl").write_text("\n".join([*lines[:-1], json.dumps(broken)]) + "\n")
    wrong = reshape(out)
    assert wrong.returncode == 1
    assert "FAIL: 3 of 4 cases" in wrong.stdout
