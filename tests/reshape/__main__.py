# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.reshape``: save at one layout, continue at another, compare the losses.

One line per case as it finishes, a bar with the time left, a table, and ``summary.json``. It can
be interrupted at any time and goes on where it was, as long as the code is the same. Exit code 1
if a case failed or is missing.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.reshape import results as known
from tests.reshape.plan import SETS, Case, Task, launches
from tests.reshape.ranks import LaunchFailed, Ranks
from tests.reshape.results import Results, Verdict

CHECKPOINTS = "checkpoints"
_WORK = "tests.reshape.worker:work"
_POLL_S = 0.2
_INTERRUPTED = 130
# Between two versions of the summary; the results themselves are kept at once.
_WRITE_S = 2.0


class Command:
    """One run of the command.

    Args:
        out: folder of checkpoints and results.
        name: of the set of cases.
        cases: of the set.
        say: prints a line.
        advance: told how many tasks were done since the last time.
    """

    def __init__(
        self,
        out: Path,
        name: str,
        cases: list[Case],
        say: Callable[[str], None],
        advance: Callable[[int], None],
    ) -> None:
        self.out, self.name, self.cases, self._say, self._advance = out, name, cases, say, advance
        self.start = time.monotonic()
        self.results = Results(out, known.fingerprint())
        self.results.forget_failures()
        self._verdicts = {case: self.results.judge(case) for case in cases}
        self._case = {case.key: case for case in cases}
        self._written = 0.0

    def left(self, tasks: list[Task]) -> list[Task]:
        """Tasks without a result."""
        return [task for task in tasks if not self.results.is_done(task, self.out / CHECKPOINTS)]

    def run(self) -> dict[Case, Verdict]:
        """Run what is left; returns what became of each case."""
        for case, verdict in self._verdicts.items():
            if verdict.status != "missing":
                self._say(f"{known.line(case, verdict)}  (known)")
        for tasks in launches(self.cases):
            left = self.left(tasks)
            while left:
                left = self._launch(left)
        self._verdicts = {case: self.results.judge(case) for case in self.cases}
        self._write()
        return self._verdicts

    def _launch(self, tasks: list[Task]) -> list[Task]:
        """One launch; returns what it left undone, without the task that brought it down."""
        for task in tasks:  # what a killed run left half done
            if task.save is not None:
                shutil.rmtree(self.out / CHECKPOINTS / task.save, ignore_errors=True)
        plain = [task.as_dict() for task in tasks]
        with Ranks(tasks[0].place.world, _WORK, str(self.out), plain) as ranks:
            try:
                while not ranks.wait(_POLL_S):
                    self._take_in()
            except LaunchFailed as failure:
                self._take_in()
                undone = [task for task in tasks if task.key not in self.results.by_key]
                if undone:
                    self.results.add(undone[0].key, error=str(failure))
                    self._take_in()
                return undone[1:]
        self._take_in()
        return []

    def _take_in(self) -> None:
        """Print what is decided now, and keep the summary up to date."""
        new = self.results.read()
        if not new:
            return
        self._advance(len(new))
        for case in (self._case[key] for key in new if key in self._case):
            self._verdicts[case] = self.results.judge(case)
            self._say(known.line(case, self._verdicts[case]))
        if time.monotonic() - self._written > _WRITE_S:
            self._write()

    def _write(self) -> None:
        seconds = time.monotonic() - self.start
        known.write_summary(self.out / known.SUMMARY, self._verdicts, self.name, seconds)
        self._written = time.monotonic()


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.reshape", description=__doc__)
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--all", dest="cases", action="store_const", const="all", help="every pair of layouts"
    )
    which.add_argument(
        "--quick", dest="cases", action="store_const", const="quick", help="what the tests run"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/reshape"), help="folder for results")
    parser.add_argument("--fresh", action="store_true", help="run everything again")
    parser.set_defaults(cases="usual")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """The command; returns the exit code."""
    from tqdm import tqdm

    options = parse(argv)
    if options.fresh:
        shutil.rmtree(options.out, ignore_errors=True)
    cases = SETS[options.cases]()
    total = sum(map(len, launches(cases)))
    # The time left is that of the last tasks: those of a launch differ from another one's.
    with tqdm(total=total, unit="task", dynamic_ncols=True, smoothing=0.05) as bar:
        command = Command(options.out, options.cases, cases, bar.write, bar.update)
        # Known results took no time; with them the bar would promise too much.
        bar.initial = bar.n = total - sum(len(command.left(tasks)) for tasks in launches(cases))
        bar.refresh()
        try:
            verdicts = command.run()
        except KeyboardInterrupt:
            bar.write("interrupted; run it again to continue")
            return _INTERRUPTED
    known.print_table(verdicts, sys.stdout)
    passed = sum(verdict.status == "PASS" for verdict in verdicts.values())
    print(
        f"{passed} of {len(cases)} cases passed in {time.monotonic() - command.start:.0f} s; "
        f"summary in {options.out / known.SUMMARY}"
    )
    return 0 if passed == len(cases) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
