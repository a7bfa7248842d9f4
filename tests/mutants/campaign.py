# SPDX-License-Identifier: Apache-2.0
"""The catalogue as a campaign: the baseline, then every mutant, one-process tests in parallel."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from campaigns.command import Campaign, CampaignError, Console
from campaigns.pages import replace_between
from campaigns.record import ROOT, Record, Result, fingerprint, versions
from tests.harness.fork_server import LIBRARIES
from tests.mutants.catalogue import MUTANTS
from tests.mutants.mutant import Mutant, check
from tests.mutants.trial import BROKEN, KILLED, KILLS, SURVIVED, TIMED_OUT, Tree, Trials

DOCS = Path("docs/mutants.md")
DOC_START = "<!-- the table below is written by: python -m tests.mutants --write-docs -->"
DOC_END = "<!-- end of the table -->"
TREE = Tree(
    root=ROOT,
    parts=(
        "megatron",
        "mimo_colocated",
        "examples",
        "campaigns",
        "tests",
        "tools",
        "pyproject.toml",
        "pins.env",
    ),
    # A rank that waits in vain: a minute is many times what any of these tests takes.
    options=("-o", "ranks_timeout=60"),
    libraries=LIBRARIES,
)
BASELINE = "baseline"
"""Under this name the record has the tests that passed without a mutant."""
_ADVICE = {
    SURVIVED: "no test notices: write one that does, beside the module's other tests",
    BROKEN: "the mutant itself is wrong, or its tests cannot run: look at its message",
}
_MESSAGE_CHARACTERS = 120
# Each test of the baseline may take this long on a busy machine, on top of the first launch.
_BASELINE_S_PER_TEST = 60.0


class Mutants(Campaign):
    """Break a copy of the code in many small ways; every break must be noticed by a test.

    Args:
        mutants: the catalogue.
        tree: that is copied and broken.
    """

    module, nouns, title = "tests.mutants", ("mutant", "mutants"), "Mutants"
    columns = ("mutant", "file", "status", "seconds", "noticed by")

    def __init__(self, mutants: Sequence[Mutant] = MUTANTS, tree: Tree = TREE) -> None:
        self._catalogue, self._tree = mutants, tree
        self.folder = tree.root / "runs" / "mutants"

    def add_options(self, add: Callable[..., Any]) -> None:
        """See ``--help``."""
        add("--only", action="append", default=[], metavar="NAME", help="this; may be repeated")
        add("--ranks", type=int, default=0, help="those whose tests take this many processes")
        add("--jobs", type=int, default=0, help="one-process mutants at a time (default: cores)")
        add("--cold", action="store_true", help="every process imports everything anew: slower")
        add("--write-docs", action="store_true", help=f"put the last results into {DOCS} and end")

    def choose(self, given: argparse.Namespace) -> Sequence[str]:
        """The mutants asked for, all of which fit the code."""
        names = [mutant.name for mutant in self._catalogue]
        if unknown := sorted(set(given.only) - set(names)):
            raise CampaignError(
                f"no mutant is called {', '.join(unknown)}; there are: {', '.join(names)}"
            )
        self._mutants = {
            mutant.name: mutant
            for mutant in self._catalogue
            if (not given.only or mutant.name in given.only) and given.ranks in (0, mutant.ranks)
        }
        if not self._mutants:
            raise CampaignError(f"no mutant has tests that take {given.ranks} processes")
        if problems := check(self._catalogue, self._tree.root):
            raise CampaignError("\n".join(problems))
        self._given, self._baseline = given, {}
        return list(self._mutants)

    def fingerprint(self) -> str:
        """Of the tree without the mutants themselves: each has a mark of its own."""
        files = (file for file in self._tree.files() if "mutants" not in file.parts)
        return fingerprint(files, None, self._tree.root)

    def keeps(self, name: str, result: Result) -> bool:
        """Kills of the very same mutant, and the tests that passed without one."""
        if name == BASELINE:
            self._baseline = result
            return True
        mutant = next((m for m in self._catalogue if m.name == name), None)
        same = mutant is not None and result.get("fingerprint") == mutant.fingerprint()
        return same and result["passed"] is True

    def run(self, left: Sequence[str], console: Console) -> Iterator[tuple[str, Result]]:
        """The baseline, mutants of one process several at a time, those of launches one by one."""
        if self._given.write_docs:
            raise CampaignError(f"not run yet on this code: {', '.join(left)}; run them first")
        tree = replace(self._tree, libraries=()) if self._given.cold else self._tree
        todo = [self._mutants[name] for name in left]
        with Trials(tree) as trials:
            yield from self._run_baseline(trials, todo, console)
            alone = [mutant for mutant in todo if mutant.ranks == 1]
            launched = [mutant for mutant in todo if mutant.ranks > 1]
            yield from run_mutants(trials, alone, self._given.jobs or os.cpu_count() or 1)
            yield from run_mutants(trials, launched, 1)

    def _run_baseline(
        self, trials: Trials, mutants: Sequence[Mutant], console: Console
    ) -> Iterator[tuple[str, Result]]:
        """Pass every test without a mutant, unless the record says that they did."""
        tests = list(dict.fromkeys(test for mutant in mutants for test in mutant.tests))
        known = set(self._baseline.get("tests", ()))
        if set(tests) <= known:
            return
        console.note(f"baseline: {len(tests)} test ids without a mutant ...")
        finished = trials.baseline(tests, trials.tree.timeout + _BASELINE_S_PER_TEST * len(tests))
        wrong = [f"{test}: {message}" for test, message in finished.failures + finished.errors]
        if finished.code != 0 or finished.skipped or not finished.passed:
            outcome = "no end in time" if finished.code is None else f"exit code {finished.code}"
            raise CampaignError(
                f"the tests have to pass before mutants are tried, but without one there were "
                f"{len(wrong)} failures and {finished.skipped} skipped ({outcome})\n"
                + ("\n".join(wrong) or finished.output)
            )
        seconds = round(finished.seconds, 1)
        console.note(f"baseline: {finished.passed} tests passed in {seconds} s")
        yield (
            BASELINE,
            {
                "passed": None,
                "tests": sorted({*known, *tests}),
                "count": finished.passed,
                "seconds": seconds,
            },
        )

    def row(self, name: str, result: Result | None) -> tuple[str, ...]:
        """(mutant, file, status, seconds, noticed by)."""
        file = short(self._mutants[name].file)
        if result is None:
            return name, file, "missing", "", ""
        noticed = result["test"].partition("[")[0] or result["message"]
        return name, file, result["status"], f"{result['seconds']:.1f}", noticed

    def line(self, name: str, result: Result) -> str:
        """One line for a mutant that is done."""
        if name == BASELINE:
            return ""
        by = f" by {result['test']}" if result["test"] else ""
        head = f"{result['status']:21s} {name:42s} {result['seconds']:6.1f} s"
        return f"{head}{by}: {result['message'][:_MESSAGE_CHARACTERS]}"

    def close(self, given: argparse.Namespace, record: Record) -> Sequence[str]:
        """What to do about those that were not killed; the table of the docs."""
        if given.write_docs:
            text = "\n".join(markdown(self._catalogue, record.results))
            replace_between(self._tree.root / DOCS, DOC_START, DOC_END, text)
            return [f"wrote {self._tree.root / DOCS}"]
        statuses = {name: record.results[name]["status"] for name in self._mutants}
        late = sum(status == TIMED_OUT for status in statuses.values())
        lines = [f"{late} were killed by a deadline"] if late else []
        for status, what in _ADVICE.items():
            if names := [name for name, its in statuses.items() if its == status]:
                lines.append(f"{status} ({what}): {', '.join(names)}")
        return lines


def run_mutants(
    trials: Trials, mutants: Sequence[Mutant], jobs: int
) -> Iterator[tuple[str, Result]]:
    """Judge mutants and yield each as it is done; ends everything that runs when it is closed."""
    with ThreadPoolExecutor(jobs) as pool:
        waiting: dict[Future, Mutant] = {pool.submit(trials.judge, m): m for m in mutants}
        try:
            while waiting:
                done, _ = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    mutant, verdict = waiting.pop(future), future.result()
                    passed = verdict.status in KILLS
                    mark = {"passed": passed, "fingerprint": mutant.fingerprint()}
                    yield mutant.name, {**mark, **asdict(verdict)}
        except BaseException:  # Ctrl-C, or nobody asks for more
            for future in waiting:
                future.cancel()
            trials.stop()
            raise


def markdown(mutants: Sequence[Mutant], results: Mapping[str, Result]) -> Iterator[str]:
    """Lines of the table in the docs."""
    on = ", ".join(f"{name} {version}" for name, version in versions().items())
    baseline, known = results[BASELINE], [results[mutant.name] for mutant in mutants]
    yield (
        f"{sum(result['passed'] for result in known)} of {len(mutants)} mutants killed, in "
        f"{sum(result['seconds'] for result in known):.0f} s of test runs and "
        f"{baseline['seconds']:.0f} s for the {baseline['count']} tests without a mutant; "
        f"{os.cpu_count()} cores, {on}."
    )
    yield ""
    yield "| mutant | in | what it would do | ranks | s | noticed by |"
    yield "|---|---|---|---|---|---|"
    for mutant, result in zip(mutants, known, strict=True):
        noticed = f"`{result['test']}`" if result["test"] else result["message"]
        if result["status"] != KILLED:
            noticed = f"**{result['status']}** {noticed}"
        cells = [f"`{mutant.name}`", f"`{short(mutant.file)}`", mutant.why, str(mutant.ranks)]
        cells += [f"{result['seconds']:.0f}", noticed]
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def short(file: str) -> str:
    """The path inside the package."""
    return file.removeprefix("megatron/core/").removeprefix("models/mimo/")
