# SPDX-License-Identifier: Apache-2.0
"""What plain ``pytest`` reports when ranks pass, fail, hang, die or cannot even start.

Launches cost seconds, so one project holds all the cases that can share a session.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.harness_tests.project import Result, run_project

_CASES = """
import os, sys, time
import pytest, torch
import torch.distributed as dist

two = pytest.mark.ranks(2)

@two
def test_all_pass(shared_tmp_path, rank_device, pytestconfig):
    (pytestconfig.rootpath / "began").touch()
    total = torch.ones(1, device=rank_device)
    dist.all_reduce(total)
    assert total.item() == dist.get_world_size() == 2
    (shared_tmp_path / str(dist.get_rank())).touch()
    dist.barrier()
    assert len(list(shared_tmp_path.iterdir())) == 2

@two
def test_rank_1_fails_at_the_end():
    dist.barrier()
    assert dist.get_rank() == 0, "only rank one says this"

@two
def test_after_a_failure():
    dist.barrier()

@two
def test_rank_1_fails_before_the_collective():
    if dist.get_rank() == 1:
        raise ValueError("rank one gave up early")
    time.sleep(1000)

@two
def test_ranks_disagree():
    if dist.get_rank() == 1:
        pytest.skip("only here")

@pytest.mark.ranks(2, timeout=3)
def test_hangs():
    while dist.get_rank() == 1:
        time.sleep(0.1)
    dist.barrier()

@two
def test_dies():
    if dist.get_rank() == 1:
        print("last words of rank one")
        os._exit(5)
    time.sleep(1000)

@two
def test_all_fail():
    assert not dist.is_initialized(), "everyone says this"

@two
def test_last():
    dist.barrier()

def test_one_process(pytestconfig):
    deadline = time.monotonic() + 200
    while not (pytestconfig.rootpath / "began").exists():
        assert time.monotonic() < deadline, "the launch has not begun beside this test"
        time.sleep(0.05)
    assert not dist.is_initialized() and "WORLD_SIZE" not in os.environ
"""


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Result:
    folder = tmp_path_factory.mktemp("cases")
    return run_project(folder, {"test_cases.py": _CASES}, ranks_timeout=60, ranks_grace=8)


def test_every_test_has_its_own_outcome(cases: Result) -> None:
    outcomes = {name: (r.when, r.outcome) for name, r in cases.reports.items()}
    failed = {name for name, outcome in outcomes.items() if outcome == ("call", "failed")}
    passed = {name for name, outcome in outcomes.items() if outcome == ("call", "passed")}
    assert passed == {"test_all_pass", "test_after_a_failure", "test_last", "test_one_process"}
    assert failed == set(outcomes) - passed
    assert len(outcomes) == 10
    assert cases.returncode == 1


def test_failure_on_one_rank_names_the_rank_and_keeps_its_text(cases: Result) -> None:
    text = cases.reports["test_rank_1_fails_at_the_end"].text
    assert text.startswith("rank 1 of 2 failed\n")
    assert "AssertionError: only rank one says this" in text
    assert "rank 1 of 2 failed: AssertionError" in cases.output


def test_failure_that_leaves_others_waiting_shows_where_they_were(cases: Result) -> None:
    text = cases.reports["test_rank_1_fails_before_the_collective"].text
    assert text.startswith("rank 1 of 2 failed\n")
    assert "ValueError: rank one gave up early" in text
    assert "the other ranks did not finish after rank 1 failed" in text
    waiting = text[text.index("rank 0 was in this test") :]
    assert re.search(r'test_cases\.py", line \d+ in test_rank_1_fails_before_the_coll', waiting)
    assert "_pytest" not in waiting


def test_failure_everywhere_is_told_once_with_one_line_for_each_other_rank(cases: Result) -> None:
    text = cases.reports["test_all_fail"].text
    first = re.match(r"rank (\d) of 2 failed", text)
    assert first is not None
    assert text.count("def test_all_fail") == 1
    assert f"rank {1 - int(first[1])} failed too: AssertionError: everyone says this" in text


def test_deadline_shows_where_each_rank_was(cases: Result) -> None:
    text = cases.reports["test_hangs"].text
    assert re.match(r"rank \d ran into the deadline of the test: Timeout \(0:00:03\)!", text)
    assert text.count(" in test_hangs") == 2


def test_dead_rank_is_named_with_its_exit_code_and_last_output(cases: Result) -> None:
    text = cases.reports["test_dies"].text
    assert text.startswith("rank 1 died (exit code 5); its last output:\n")
    assert "last words of rank one" in text


def test_different_outcomes_are_a_failure(cases: Result) -> None:
    text = cases.reports["test_ranks_disagree"].text
    assert text == "the ranks disagree about the outcome: rank 0 passed, rank 1 skipped"


def test_progress_says_how_many_tests_each_launch_has(cases: Result) -> None:
    launches = re.findall(r"^2 ranks: one launch for (\d+) tests", cases.output, re.MULTILINE)
    # All nine; then what is left after the stuck, the hanging and the dead one.
    assert launches == ["9", "5", "3", "2"]


def test_torchrun_starts_the_ranks_where_they_are_not_forked(tmp_path: Path) -> None:
    head, _, rest = _CASES.partition("@two\ndef test_dies")
    cases = head.partition("@two")[0] + "@two\ndef test_dies" + rest.partition("@two")[0]
    # Left out of the forked ranks' environment: which of the two it was.
    cases += "def test_agent():\n    pass\n"
    cases = cases.replace("if dist", 'assert "TORCHELASTIC_RUN_ID" in os.environ\n    if dist')
    result = run_project(tmp_path, {"test_cases.py": cases}, ranks_start="torchrun", ranks_grace=3)
    assert result.reports["test_agent"].outcome == "passed"
    text = result.reports["test_dies"].text
    assert text.startswith("rank 1 died (exit code 5); its last output:\n")
    assert "last words of rank one" in text


def test_launch_that_never_reaches_a_test_is_an_error_of_each(tmp_path: Path) -> None:
    text = """
import os, sys
import pytest
if os.environ.get("RANK") == "1":
    print("cannot go on", file=sys.stderr)
    os._exit(9)

@pytest.mark.ranks(2)
@pytest.mark.parametrize("n", [1, 2])
def test_a(n):
    pass
"""
    result = run_project(tmp_path, {"test_a.py": text})
    assert set(result.reports) == {"test_a[1]", "test_a[2]"}
    for report in result.reports.values():
        assert (report.when, report.outcome) == ("setup", "failed")
        assert report.text.startswith(
            "the launch of 2 ranks ended before this test: rank 1 died (exit code 9)"
        )
    assert len(re.findall("one launch", result.output)) == 1


_FAULTY = """
import os
import pytest
import torch.distributed as dist

@pytest.mark.ranks(2)
def test_fault():
    dist.barrier()
    if dist.get_rank() == 1:
        os.abort()
    dist.barrier()

@pytest.mark.ranks(2)
def test_after():
    dist.barrier()
"""


def test_a_fault_of_a_library_is_told_with_its_frames_and_pythons(tmp_path: Path) -> None:
    result = run_project(tmp_path, {"test_a.py": _FAULTY})
    assert result.returncode == pytest.ExitCode.TESTS_FAILED
    outcomes = {name: report.outcome for name, report in result.reports.items()}
    assert outcomes == {"test_fault": "failed", "test_after": "passed"}
    text = result.reports["test_fault"].text
    assert text.startswith("rank 1 died (exit code -6)")
    # Frames of the process itself, not only Python's.
    assert re.search(r"frame #\d+: abort \+ ", text)
    assert " in test_fault" in text


def test_marker_with_another_size_is_refused(tmp_path: Path) -> None:
    text = "import pytest\n@pytest.mark.ranks(3)\ndef test_a():\n    pass\n"
    result = run_project(tmp_path, {"test_a.py": text})
    assert result.returncode == pytest.ExitCode.USAGE_ERROR
    sentence = r"expected ranks\(n\) .* with n one of \(1, 2, 4, 8\), got args \(3,\)"
    assert re.search(sentence, result.output)


_HERE = """
import os

def test_here(pytestconfig):
    (pytestconfig.rootpath / "here").write_text(str(os.getpid()))
"""
_BESIDE = """
import os, time
import pytest

def wait_for(path):
    deadline = time.monotonic() + 200
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} does not run beside this test"
        time.sleep(0.05)
    return path.read_text()

def test_in_a_process_of_its_own(pytestconfig, tmp_path):
    assert wait_for(pytestconfig.rootpath / "here") != str(os.getpid())
    assert not [name for name in os.environ if name.startswith("MIMO_TEST")]
    assert "WORLD_SIZE" not in os.environ and list(tmp_path.iterdir()) == []

def test_wrong():
    assert 1 == 2, "as it is said there"

@pytest.mark.skip(reason="for this")
def test_left_out(): ...

@pytest.mark.xfail(strict=True)
def test_known(): raise ValueError

@pytest.fixture
def broken(): raise ValueError("before the test")

def test_broken(broken): ...

def test_dies():
    os._exit(7)

def test_after_it(): ...
"""


def test_those_beside_run_in_a_second_process_and_say_the_same(tmp_path: Path) -> None:
    files = {"test_here.py": _HERE, "test_there.py": _BESIDE}
    ini = {"beside": "test_there.py", "beside_from": 7, "addopts": "-ra"}
    result = run_project(tmp_path, files, **ini)
    assert re.search(r"SKIPPED \[1\] test_there\.py:\d+: for this", result.output)
    assert "beside: one process for 7 tests ..." in result.output
    outcomes = {name: (r.when, r.outcome) for name, r in result.reports.items()}
    assert outcomes == {
        "test_here": ("call", "passed"),
        "test_in_a_process_of_its_own": ("call", "passed"),
        "test_wrong": ("call", "failed"),
        "test_left_out": ("setup", "skipped"),
        "test_known": ("call", "skipped"),
        "test_broken": ("setup", "failed"),
        "test_dies": ("call", "failed"),
        "test_after_it": ("call", "passed"),
    }
    assert "as it is said there" in result.reports["test_wrong"].text
    assert "rank" not in result.reports["test_wrong"].text
    assert "was in this test" in result.reports["test_dies"].text


def test_few_of_those_beside_run_here(tmp_path: Path) -> None:
    says = "def test_there(pytestconfig):\n"
    says += "    assert pytestconfig.pluginmanager.has_plugin('mimo-supervisor')\n"
    files = {"test_there.py": says}
    result = run_project(tmp_path, files, beside="test_there.py", beside_from=2)
    assert result.returncode == 0, result.output
    assert "beside" not in result.output
