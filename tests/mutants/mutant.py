# SPDX-License-Identifier: Apache-2.0
"""What a mutant is, and how it gets into a tree."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


class StaleMutantError(ValueError):
    """A mutant does not fit the code any more."""


@dataclass(frozen=True)
class Mutant:
    """One small mistake.

    Attributes:
        name: short, unique, for ``--only``.
        file: path of the file that is changed, from the tree's root.
        old: text that occurs exactly once in the file.
        new: what stands there instead.
        tests: pytest node ids of functions that must notice, the cheapest ones that do. Without
            parameters: those change more often than they would save time.
        why: what this mistake would do to a training run.
        ranks: processes that the tests take; those of one process run several at a time.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    why: str
    ranks: int = 1

    def fingerprint(self) -> str:
        """Changes with anything that could change the outcome."""
        text = "\0".join([self.file, self.old, self.new, *self.tests])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def mutated(self, root: Path) -> str:
        """The file's text with the mistake in it.

        Raises:
            StaleMutantError: the file is not there, the text is not there exactly once, or the
                result is no Python.
        """
        path = root / self.file
        if not path.is_file():
            raise StaleMutantError(f"{self.name}: {self.file} does not exist")
        text = path.read_text()
        count = text.count(self.old)
        if count != 1 or self.old == self.new:
            raise StaleMutantError(
                f"{self.name}: its old text occurs {count} times in {self.file} and must occur "
                f"once (and differ from the new text); bring the mutant up to date: {self.old!r}"
            )
        text = text.replace(self.old, self.new)
        try:
            compile(text, str(path), "exec")
        except SyntaxError as error:
            raise StaleMutantError(f"{self.name}: the new text is no Python: {error}") from error
        return text

    def apply(self, root: Path) -> None:
        """Make the mistake in the tree at ``root``.

        Raises:
            StaleMutantError: as :meth:`mutated`.
        """
        (root / self.file).write_text(self.mutated(root))


def check(mutants: Iterable[Mutant], root: Path) -> list[str]:
    """What is wrong with the mutants as they stand beside the code at ``root``; one line each."""
    mutants = list(mutants)
    counts = Counter(mutant.name for mutant in mutants)
    problems = [f"{name}: {n} mutants have this name" for name, n in counts.items() if n > 1]
    seen: dict[tuple[str, str], str] = {}
    for mutant in mutants:
        missing = [test for test in mutant.tests if not _is_there(test, root)]
        if missing or not mutant.tests:
            problems.append(f"{mutant.name}: its tests are not there: {missing or 'none given'}")
        try:
            first = seen.setdefault((mutant.file, mutant.mutated(root)), mutant.name)
        except StaleMutantError as error:
            problems.append(str(error))
            continue
        if first != mutant.name:
            problems.append(f"{mutant.name}: makes the same change as {first}; drop one of them")
    return problems


def _is_there(test: str, root: Path) -> bool:
    """Whether a file has the function that a node id names."""
    file, *names = test.split("::")
    path = root / file
    if not path.is_file() or not names:
        return False
    text = path.read_text()
    # Patterns, not a parser: this runs for every mutant in a test of its own.
    return all(
        re.search(rf"^{' ' * 4 * depth}(?:class|def) {re.escape(name)}\b", text, re.MULTILINE)
        for depth, name in enumerate(names)
    )
