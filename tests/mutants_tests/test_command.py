# SPDX-License-Identifier: Apache-2.0
"""The whole command on a toy tree: pytest runs a handful of times, without torch."""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from campaigns.command import main
from tests.mutants.campaign import DOC_END, DOC_START, Mutants
from tests.mutants.mutant import Mutant
from tests.mutants.trial import BROKEN, KILLED, SURVIVED, TIMED_OUT, Finished, Tree, verdict

CODE = """
def double(x):
    return 2 * x

def wait():
    while False:
        pass

def unseen():
    return 1
"""
TESTS = """
import pytest
from toy.code import double, unseen, wait

def test_double():
    assert double(3) == 6

def test_wait():
    wait()

def test_unseen():
    assert unseen() > 0

@pytest.fixture
def four():
    return double(2) if double(1) == 2 else 1 / 0

def test_in_a_fixture(four):
    assert four == 4
"""


def toy(name: str, old: str, new: str, test: str, ranks: int = 1) -> Mutant:
    node = f"tests/test_toy.py::{test}"
    return Mutant(name, "toy/code.py", old, new, (node,), "it would be wrong", ranks)


SEEN = toy("seen", "2 * x", "5 * x", "test_double")
HANGS = toy("hangs", "while False", "while True", "test_wait", ranks=2)
UNSEEN = toy("unseen", "return 1", "return 2", "test_unseen")
TYPO = toy("typo", "2 * x", "2 * xx", "test_double")
IN_A_FIXTURE = toy("in-a-fixture", "2 * x", "3 * x", "test_in_a_fixture")
NO_IMPORT = toy("no-import", "def wait()", "def weight()", "test_wait")
ALL = (SEEN, UNSEEN, TYPO, IN_A_FIXTURE, NO_IMPORT)


def make_tree(root: Path, timeout: float = 60.0) -> Tree:
    for file, text in {
        "toy/__init__.py": "",
        "toy/code.py": CODE,
        "tests/test_toy.py": TESTS,
        "pytest.ini": "[pytest]\n",
        "docs/mutants.md": f"# Before\n{DOC_START}\nold\n{DOC_END}\nAfter.\n",
    }.items():
        (root / file).parent.mkdir(exist_ok=True)
        (root / file).write_text(text)
    parts = ("toy", "tests", "pytest.ini")
    return Tree(root, parts, ("-p", "no:hypothesispytest"), timeout, libraries=("pytest",))


class Command:
    """The command on the toy tree; results go into the tree's own ``runs``."""

    def __init__(self, tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
        self.tree, self.capsys = tree, capsys

    def __call__(self, *arguments: str, mutants: tuple[Mutant, ...] = ALL) -> tuple[int, str]:
        output = ["--output", str(self.tree.root / "runs")]
        code = main(Mutants(mutants, self.tree), [*output, *arguments])
        captured = self.capsys.readouterr()
        return code, captured.out + captured.err

    def statuses(self) -> dict[str, str]:
        return {name: result["status"] for name, result in self.summary()["results"].items()}

    def summary(self) -> dict[str, Any]:
        return json.loads((self.tree.root / "runs" / "summary.json").read_text())


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(make_tree(tmp_path), capsys)


def test_every_kind_of_outcome_then_resumed(command: Command) -> None:
    before = {file: file.read_bytes() for file in command.tree.files()}
    code, output = command()
    assert code == 1
    assert command.statuses() == {
        "seen": KILLED,
        "unseen": SURVIVED,
        "typo": BROKEN,
        "in-a-fixture": BROKEN,
        "no-import": BROKEN,
    }
    assert {file: file.read_bytes() for file in command.tree.files()} == before
    assert "FAIL: 1 of 5 mutants" in output
    assert re.search(r"SURVIVED \(.*\): unseen\n", output)
    assert re.search(r"BROKEN \(.*\): typo, in-a-fixture, no-import\n", output)
    summary = command.summary()
    assert summary["passed"] == 1
    assert summary["failed"] == ["unseen", "typo", "in-a-fixture", "no-import"]

    # Kills and the baseline are kept, everything else is tried again.
    code, output = command("--only", "seen", "--only", "unseen")
    assert code == 1
    assert "1 kept from" in output
    assert "FAIL: 1 of 2 mutants" in output
    assert "tests passed in" not in output
    assert command("--only", "seen")[0] == 0


@pytest.mark.parametrize("arguments", [[], ["--cold"]])
def test_a_hang_is_a_kill_and_leaves_no_process(arguments: list[str], command: Command) -> None:
    command.tree = replace(command.tree, timeout=2.0)
    code, output = command(*arguments, mutants=(HANGS,))
    assert code == 0
    assert command.statuses() == {"hangs": TIMED_OUT}
    assert "1 were killed by a deadline\nPASS: 1 of 1 mutants" in output
    assert not [line for line in running() if "mutant-" in line and "test_wait" in line]


def running() -> list[str]:
    """Command lines of all processes of this machine."""
    files = Path("/proc").glob("[0-9]*/cmdline")
    lines = []
    for file in files:
        with contextlib.suppress(OSError):
            lines.append(file.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return lines


def test_what_changed_is_tried_again_and_so_with_fresh(command: Command) -> None:
    assert command(mutants=(SEEN,))[0] == 0
    resumed = []
    for arguments in ([], ["--fresh"]):
        code, output = command(*arguments, mutants=(SEEN,))
        resumed.append((code, "kept from" in output))
    code, output = command(mutants=(replace(SEEN, new="4 * x"),))
    resumed.append((code, "kept from" in output))
    (command.tree.root / "tests" / "test_toy.py").write_text(TESTS + "\n# changed\n")
    code, output = command(mutants=(SEEN,))
    resumed.append((code, "kept from" in output))
    assert resumed == [(0, True), (0, False), (0, False), (0, False)]


def test_tests_that_fail_without_a_mutant(command: Command) -> None:
    (command.tree.root / "toy" / "code.py").write_text(CODE.replace("return 1", "return 0"))
    stale_free = (replace(UNSEEN, old="return 0"),)
    code, output = command(mutants=stale_free)
    assert code == 2
    assert "have to pass before mutants are tried" in output
    assert "test_toy::test_unseen: assert 0 > 0" in output


def test_a_skipped_test_notices_nothing(command: Command) -> None:
    skipped = TESTS.replace("def test_double", "@pytest.mark.skip\ndef test_double")
    (command.tree.root / "tests" / "test_toy.py").write_text(skipped)
    code, output = command(mutants=(SEEN,))
    assert code == 2
    assert "0 failures and 1 skipped" in output


def test_the_table_of_the_docs(command: Command) -> None:
    docs = command.tree.root / "docs" / "mutants.md"
    assert command("--write-docs", mutants=(SEEN,))[0] == 2
    assert command(mutants=(SEEN,))[0] == 0
    assert command("--write-docs", mutants=(SEEN,))[0] == 0
    text = docs.read_text()
    assert text.startswith("# Before\n")
    assert text.endswith(f"{DOC_END}\nAfter.\n")
    assert "1 of 1 mutants killed" in text
    assert "| `seen` | `toy/code.py` | it would be wrong | 1 |" in text
    code, output = command("--write-docs", mutants=(SEEN, UNSEEN))
    assert code == 2
    assert "not run yet on this code: unseen" in output


@pytest.mark.parametrize(
    ("arguments", "mutants", "message"),
    [
        (["--only", "sene"], ALL, "no mutant is called sene; there are: seen, unseen"),
        (["--ranks", "4"], ALL, "no mutant has tests that take 4 processes"),
        ([], (replace(SEEN, old="5 * x"),), "its old text occurs 0 times"),
        ([], (replace(SEEN, tests=("tests/test_toy.py::test_no",)),), "tests are not there"),
    ],
)
def test_what_cannot_be_tried(
    arguments: list[str], mutants: tuple[Mutant, ...], message: str, command: Command
) -> None:
    code, output = command(*arguments, mutants=mutants)
    assert code == 2
    assert message in output
    assert not (command.tree.root / "runs").exists()


def test_the_list_runs_nothing(command: Command) -> None:
    code, output = command("--list")
    assert code == 0
    assert all(mutant.name in output for mutant in ALL)
    assert not (command.tree.root / "runs").exists()


@pytest.mark.parametrize(
    ("finished", "status"),
    [
        ({"code": 1, "failures": [("t", "AssertionError: 1 != 2")]}, KILLED),
        ({"code": 1, "failures": [("t", "rank 3 of 8 failed: ValueError: no")]}, KILLED),
        ({"code": 1, "failures": [("t", "rank 3 of 8 failed: NameError: no")]}, BROKEN),
        ({"code": 1, "failures": [("t", "ImportError: no")]}, BROKEN),
        ({"code": 1, "failures": [("t", "rank 0 ran into the deadline of the test")]}, TIMED_OUT),
        ({"code": None}, TIMED_OUT),
        ({"code": 0, "passed": 1}, SURVIVED),
        ({"code": 0, "skipped": 1}, BROKEN),
        ({"code": 1, "errors": [("t", "the launch ended before this test")]}, BROKEN),
        ({"code": 2, "errors": [("t", "collection failure")]}, BROKEN),
        ({"code": 4}, BROKEN),
        ({"code": 5}, BROKEN),
    ],
)
def test_verdicts(finished: dict[str, Any], status: str) -> None:
    fields = {"seconds": 1.0, "passed": 0, "skipped": 0, "failures": [], "errors": []}
    assert verdict(Finished(**{**fields, "output": "", **finished})).status == status
