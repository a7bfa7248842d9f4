# SPDX-License-Identifier: Apache-2.0
"""The catalogue fits the code as it is: one process, nothing is run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mutants.catalogue import MUTANTS
from tests.mutants.mutant import Mutant, StaleMutantError, check

ROOT = Path(__file__).resolve().parents[2]

# The mistakes that are known to have cost training runs; none may leave the catalogue.
KNOWN = {
    "no-cp-sum",
    "cp-sum-over-dp-cp",
    "cp-mean-instead-of-sum",
    "dp-only-token-count",
    "pooled-fan-out-groups",
    "reversed-slot-order",
    "zero-pad-instead-of-gather",
    "fan-out-slice-from-the-cp-0-table",
    "contiguous-instead-of-zigzag",
    "gradient-mutated-in-place",
    "cp-group-not-handed-on",
    "divisor-on-one-module-only",
    "tp-replicas-counted-twice-in-the-norm",
    "sequence-major-rows",
    "local-layer-index-in-init",
}


def test_every_mutant_fits_the_code() -> None:
    """A failure here means: the code moved on, bring the mutant's old text (or tests) along."""
    assert check(MUTANTS, ROOT) == []


def test_the_known_mistakes_are_there() -> None:
    assert KNOWN - {mutant.name for mutant in MUTANTS} == set()
    assert len(MUTANTS) >= 30


def mutant(**changes: object) -> Mutant:
    fields = {"name": "a", "file": "code.py", "old": "x + 1", "new": "x - 1", "why": "wrong"}
    return Mutant(**{**fields, "tests": ("test_code.py::TestIt::test_it",), **changes})


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "code.py").write_text("def up(x):\n    return x + 1\n")
    (tmp_path / "test_code.py").write_text("class TestIt:\n    def test_it(self):\n        pass\n")
    return tmp_path


def test_a_mutant_changes_its_text_and_nothing_else(tree: Path) -> None:
    assert check([mutant()], tree) == []
    mutant().apply(tree)
    assert (tree / "code.py").read_text() == "def up(x):\n    return x - 1\n"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"old": "y"}, "occurs 0 times in code.py"),
        ({"old": "x"}, "occurs 2 times in code.py"),
        ({"new": "x + 1"}, "differ from the new text"),
        ({"new": "x +"}, "no Python"),
        ({"file": "other.py"}, "other.py does not exist"),
        ({"tests": ()}, "none given"),
        ({"tests": ("test_other.py",)}, "test_other.py"),
        ({"tests": ("test_code.py::TestIt::test_that",)}, "TestIt::test_that"),
        ({"tests": ("test_code.py::test_it",)}, "code.py::test_it"),
        ({"tests": ("test_code.py::TestIt::test_it[1]",)}, "test_it[1]"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict, message: str, tree: Path) -> None:
    (problem,) = check([mutant(**changes)], tree)
    assert problem.startswith("a: ")
    assert message in problem


def test_a_stale_mutant_leaves_the_file_alone(tree: Path) -> None:
    before = (tree / "code.py").read_text()
    with pytest.raises(StaleMutantError, match="bring the mutant up to date"):
        mutant(old="y").apply(tree)
    assert (tree / "code.py").read_text() == before


def test_names_are_unique(tree: Path) -> None:
    assert check([mutant(), mutant()], tree) == ["a: 2 mutants have this name"]


def test_a_repeat_is_a_problem_however_its_text_is_cut(tree: Path) -> None:
    again = mutant(name="b", old="return x + 1", new="return x - 1")
    assert check([mutant(), again], tree) == ["b: makes the same change as a; drop one of them"]
    assert check([mutant(), mutant(name="b", new="x + 2")], tree) == []
