# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.mutants``: exits 0 if the tests notice every mutant.

Exits 1 if a mutant survives or is broken, 2 if nothing can be tried: a stale mutant, an unknown
name, tests that fail without a mutant.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from tests.mutants import report
from tests.mutants.campaign import BaselineError, run_baseline, run_mutants, tests_of
from tests.mutants.catalogue import MUTANTS
from tests.mutants.fork_server import LIBRARIES
from tests.mutants.mutant import Mutant, check
from tests.mutants.record import Record, digest
from tests.mutants.trial import KILLS, Tree, Trials

ROOT = Path(__file__).resolve().parents[2]
DOCS = Path("docs/mutants.md")
TREE = Tree(
    root=ROOT,
    parts=("megatron", "mimo_colocated", "examples", "tests", "pyproject.toml"),
    # A rank that waits in vain: a minute is many times what any of these tests takes.
    options=("-p", "tests.mutants.forked_ranks", "-o", "ranks_timeout=60"),
    libraries=LIBRARIES,
)
_NOTHING_TRIED = 2
_INTERRUPTED = 130


@dataclass(frozen=True)
class Options:
    """What the command line asks for; see ``--help``."""

    only: tuple[str, ...]
    ranks: int
    list: bool
    fresh: bool
    jobs: int
    cold: bool
    output: Path
    write_docs: bool

    @classmethod
    def parse(cls, arguments: Sequence[str] | None) -> Options:
        """Read the command line; leaves the process on ``--help`` and on mistakes."""
        parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
        parser.add_argument(
            "--only", action="append", default=[], metavar="NAME", help="this one; may be repeated"
        )
        parser.add_argument(
            "--ranks", type=int, default=0, help="those whose tests take this many processes"
        )
        parser.add_argument("--list", action="store_true", help="show the mutants, run nothing")
        parser.add_argument("--fresh", action="store_true", help="forget results of earlier runs")
        parser.add_argument(
            "--jobs", type=int, default=0, help="one-process mutants at a time (default: cores)"
        )
        parser.add_argument(
            "--cold", action="store_true", help="every process imports everything anew: slower"
        )
        parser.add_argument(
            "--output", type=Path, default=ROOT / "runs" / "mutants", help="folder of summary.json"
        )
        parser.add_argument(
            "--write-docs", action="store_true", help=f"put the last results into {DOCS} and end"
        )
        found = vars(parser.parse_args(arguments))
        return cls(**{**found, "only": tuple(found["only"])})

    def wants(self, mutant: Mutant) -> bool:
        """Whether a mutant is among those asked for."""
        named = not self.only or mutant.name in self.only
        return named and self.ranks in (0, mutant.ranks)


def main(
    arguments: Sequence[str] | None = None,
    mutants: Sequence[Mutant] = MUTANTS,
    tree: Tree = TREE,
) -> int:
    """Run the command on a catalogue and a tree; returns the exit code."""
    options = Options.parse(arguments)
    unknown = sorted(set(options.only) - {mutant.name for mutant in mutants})
    if unknown:
        names = ", ".join(mutant.name for mutant in mutants)
        return _refused([f"no mutant is called {', '.join(unknown)}; there are: {names}"])
    chosen = [m for m in mutants if options.wants(m)]
    if not chosen:
        return _refused([f"no mutant has tests that take {options.ranks} processes"])
    if options.list:
        report.show_catalogue(chosen)
        return 0
    problems = check(mutants, tree.root)
    if problems:
        return _refused(problems)
    record = Record(options.output / "summary.json", digest(tree), fresh=options.fresh)
    if options.write_docs:
        return _write_docs(record, mutants, tree)
    try:
        with Trials(replace(tree, libraries=()) if options.cold else tree) as trials:
            return _run(options, record, mutants, chosen, trials)
    except KeyboardInterrupt:
        print("\ninterrupted; run it again to continue", file=sys.stderr)
        return _INTERRUPTED


def _run(
    options: Options,
    record: Record,
    mutants: Sequence[Mutant],
    chosen: Sequence[Mutant],
    trials: Trials,
) -> int:
    todo = [mutant for mutant in chosen if not record.settled(mutant)]
    reused = len(chosen) - len(todo)
    if reused:
        print(f"resuming: {reused} mutants were killed before, on the same code", flush=True)
    if todo:
        print(f"baseline: {len(tests_of(todo))} test ids without a mutant ...", flush=True)
        try:
            finished = run_baseline(trials, record, todo)
        except BaselineError as error:
            return _refused([str(error)])
        if finished is not None:
            print(f"baseline: {finished.passed} tests passed in {finished.seconds:.1f} s")
        record.write(list(mutants))
    with tqdm(total=len(todo), unit="mutant", desc="mutants", smoothing=0.0) as bar:
        for done in run_mutants(trials, todo, options.jobs):
            record.add(done.mutant, done.verdict)
            record.write(list(mutants))
            bar.write(report.line(done))
            sys.stdout.flush()
            bar.update()
    report.show_results(chosen, record.results)
    lines = report.closing_lines(chosen, record.results, reused, len(mutants))
    print(*lines, f"results: {record.path}", sep="\n")
    return 0 if all(record.results[m.name]["status"] in KILLS for m in chosen) else 1


def _write_docs(record: Record, mutants: Sequence[Mutant], tree: Tree) -> int:
    try:
        if not record.results:
            raise ValueError(f"{record.path} holds no results for this code: run the mutants first")
        summary = json.loads(record.path.read_text())
        report.write_docs(tree.root / DOCS, mutants, summary)
    except (OSError, ValueError) as error:
        return _refused([str(error)])
    print(f"wrote {tree.root / DOCS}")
    return 0


def _refused(lines: Sequence[str]) -> int:
    print(*lines, sep="\n", file=sys.stderr)
    return _NOTHING_TRIED


if __name__ == "__main__":
    sys.exit(main())
