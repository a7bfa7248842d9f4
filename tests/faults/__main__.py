# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.faults``: exit code 0 if every case passes, 1 if not, 2 if none can be tried.

Starts the digits job on 8 ranks, once per layout without a fault and then once per case.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults import report
from tests.faults.cases import COMMON, LAYOUTS, Case, draw
from tests.faults.journal import Control, read
from tests.faults.starts import Ended, prepare, start
from tests.faults.stops import checkpoints, trained
from tests.faults.verdict import GRACE_S, Outcome, judge

DOCS = Path("docs/faults.md")
RANKS = 8
# More than any run takes that is not stuck, after its fault or without one.
_PATIENCE_S = 120.0


@dataclass(frozen=True)
class Options:
    """What the command line asks for; see ``--help``."""

    cases: int
    seed: int
    timeout: int
    only: int
    docs: bool
    output: Path

    @classmethod
    def parse(cls, arguments: Sequence[str] | None) -> Options:
        """Read the command line; leaves the process on ``--help`` and on mistakes."""
        parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
        parser.add_argument("--cases", type=int, default=75, help="how many (75)")
        parser.add_argument("--seed", type=int, default=1, help="of the draw (1)")
        parser.add_argument("--timeout", type=int, default=10, help="of the job, in seconds (10)")
        parser.add_argument("--only", type=int, default=0, help="the case of this number alone")
        parser.add_argument("--docs", action="store_true", help=f"write the figures into {DOCS}")
        parser.add_argument(
            "--output", type=Path, default=Path("runs/faults"), help="folder of cases that fail"
        )
        return cls(**vars(parser.parse_args(arguments)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    options = Options.parse(arguments)
    prepare()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        runs = Runs(Path(folder), options.timeout)
        problem = runs.control()
        if problem:
            print(f"a run without any fault fails: {problem}", file=sys.stderr)
            return 2
        cases = draw(options.cases, options.seed, runs.controls)
        chosen = [case for case in cases if options.only in (0, case.number)]
        results = []
        for case in chosen:
            done = runs.case(case)
            results.append(done)
            print(report.line(done, options.cases), flush=True)
            if not done.verdict.passed:
                runs.keep(case, options.output)
    report.show(results)
    if options.docs:
        report.write_docs(DOCS, results, options.seed, options.timeout)
    print(report.closing_line(results, options.seed))
    return 0 if all(done.verdict.passed for done in results) else 1


class Runs:
    """All starts of one campaign.

    Args:
        folder: for their output.
        timeout: of the job, in seconds.
    """

    def __init__(self, folder: Path, timeout: int) -> None:
        self.folder, self.timeout = folder, timeout
        self.controls: dict[str, Control] = {}
        self.trained: dict[str, list[tuple[Any, ...]]] = {}

    def control(self) -> str:
        """A run without fault per layout, and one that resumes it; returns what went wrong."""
        for layout in LAYOUTS:
            events = []
            for part in ("train", "resume"):
                name = f"{layout.name}-{part}"
                ended = self._start(name, layout.name, None, part == "resume")
                if ended.code != 0 or ended.left:
                    return f"{name}: exit code {ended.code}, left {ended.left}: {ended.errors}"
                events.append({rank: read(self.folder / name, rank) for rank in range(RANKS)})
            self.controls[layout.name] = Control(*events)
            self.trained[layout.name] = trained(self.folder / f"{layout.name}-train" / "out")
            print(f"without a fault: {layout.name} trains, saves, resumes and reads", flush=True)
        return ""

    def case(self, case: Case) -> report.Done:
        """One case, judged."""
        name = f"case-{case.number}"
        ended = self._start(name, case.layout, case, case.resumes)
        journal = {rank: read(self.folder / name, rank) for rank in range(RANKS)}
        faults = [event["at"] for event in journal[case.rank] if "fault" in event]
        saved = checkpoints(self.folder / name / "out")  # before another run adds to them
        again = None if case.loses_a_rank else self._again(case, name)
        outcome = Outcome(
            case=case,
            code=ended.code,
            errors=ended.errors,
            seconds=ended.at - faults[0] if faults else -1.0,
            left=ended.left,
            journal=journal,
            out=self.folder / name / "out",
            timeout=self.timeout,
            output=ended.output,
            checkpoints=saved,
            again=again,
            trained=self.trained[case.layout],
        )
        return report.Done(case, outcome, judge(outcome))

    def _again(self, case: Case, name: str) -> Ended:
        return self._start(f"{name}-again", case.layout, None, False, self.folder / name)

    def keep(self, case: Case, output: Path) -> None:
        """Copy what a case left to where it stays."""
        target = output / f"case-{case.number}"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(self.folder / f"case-{case.number}", target)

    def _start(
        self, name: str, layout: str, case: Case | None, resumes: bool, before: Path | None = None
    ) -> Ended:
        """One start; in the output folder of an earlier one if ``before`` is its folder."""
        folder = self.folder / name
        folder.mkdir()
        out = (before or folder) / "out"
        if resumes:
            shutil.copytree(self.folder / f"{layout}-train" / "out", out)
        arguments = next(each.arguments for each in LAYOUTS if each.name == layout)
        command = [*arguments.split(), *COMMON.split(), "--timeout", str(self.timeout)]
        deadline = self.timeout + GRACE_S + _PATIENCE_S
        return start([*command, "--out", str(out)], folder, case, deadline)


if __name__ == "__main__":
    sys.exit(main())
