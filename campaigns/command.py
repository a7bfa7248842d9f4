# SPDX-License-Identifier: Apache-2.0
"""The command of a campaign: its options, what is seen while it runs, its exit code.

Exit codes: 0 if every case passed, 1 if one failed or is missing, 2 if nothing could be tried,
130 if it was stopped; what was found until then is kept.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from campaigns.pages import write_whole
from campaigns.record import ROOT, Record, Result, fingerprint, versions

SUMMARY = "summary.json"
# Columns of what is printed where there is no terminal: a name of a tensor on one line.
_LOG_COLUMNS = 160
# Between two versions of the summary; the results themselves are kept at once.
_WRITE_S = 2.0
_STYLES = {True: "green", False: "bold red", None: ""}


class CampaignError(Exception):
    """Nothing can be tried; one sentence for the user."""


class Campaign:
    """What a command runs, judges and shows; a subclass per command.

    Attributes:
        module: that is run as a command.
        nouns: of one case and of several.
        title: of the table.
        columns: of the table; the first is the case's name.
        code: files that results depend on, as patterns below the project's root.
        folder: of the results, unless ``--out`` says another.
    """

    module: str
    nouns = ("case", "cases")
    title: str
    columns: tuple[str, ...]
    code: tuple[str, ...] = ("megatron/**/*.py", "mimo_colocated/**/*.py", "campaigns/*.py")
    folder: Path

    def add_options(self, add: Callable[..., Any]) -> None:
        """Declare options beside ``--out``, ``--fresh`` and ``--list``."""

    def choose(self, given: argparse.Namespace) -> Sequence[str]:
        """Check the options and return what is to be run, in order: the cases' names.

        Raises:
            CampaignError: one sentence on what is wrong.
        """
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """Return the options that results depend on."""
        return {}

    def fingerprint(self) -> str:
        """Return a mark of all that results depend on."""
        return fingerprint({f for each in self.code for f in ROOT.glob(each)}, self.settings())

    def resumes(self, given: argparse.Namespace) -> bool:
        """Whether results of an earlier run with the same code and settings count."""
        return not given.fresh

    def keeps(self, _name: str, result: Result) -> bool:
        """Whether an earlier result counts: one that passed."""
        return result.get("passed") is True

    def run(self, left: Sequence[str], console: Console) -> Iterator[tuple[str, Result]]:
        """Run cases; yield (name, result) as they end. A result says ``passed`` (None: no bound).

        One that could not run here says ``ran`` is False; it counts as neither.

        Raises:
            CampaignError: what stands in the way of all of them.
        """
        raise NotImplementedError

    def cases(
        self, names: Sequence[str], results: Mapping[str, Result]
    ) -> dict[str, Result | None]:
        """Return what became of every case, in order; where cases are made of several runs."""
        return {name: results.get(name) for name in names}

    def row(self, name: str, result: Result | None) -> tuple[str, ...]:
        """Return a case's cells of the table; ``None``: it has no result."""
        raise NotImplementedError

    def line(self, name: str, result: Result) -> str:
        """Return what is printed when a run ends, after its verdict; nothing: no line."""
        return "  ".join(c for c in self.row(name, result) if c not in ("", verdict(result)))

    def close(self, given: argparse.Namespace, record: Record) -> Sequence[str]:
        """Write pages and plots; return lines to end with.

        Raises:
            CampaignError, OSError, ValueError: what cannot be written, and why.
        """
        return ()

    def summary(self) -> dict[str, Any]:
        """Return what the summary holds besides the results."""
        return {}


class Console:
    """A line per case, and a bar with the time left where there is a terminal.

    Args:
        campaign: whose cases end.
        total: cases of the run.
        done: of these, cases that were known before.
    """

    def __init__(self, campaign: Campaign, total: int, done: int) -> None:
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self.rich = RichConsole(highlight=False, soft_wrap=True)
        if not self.rich.is_terminal:
            self.rich.width = _LOG_COLUMNS
        self._campaign, self._total, self._done = campaign, total, done
        self._known, self._started = done, time.monotonic()
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}"))
        self._bar = Progress(*columns, console=self.rich, disable=not self.rich.is_terminal)
        self._task = self._bar.add_task("", total=total, completed=done, left="")

    def __enter__(self) -> Console:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def note(self, text: str) -> None:
        """Print what is no case."""
        self._bar.console.print(f"      {text}", markup=False, style="dim")

    def case(self, name: str, result: Result) -> None:
        """Print a case that has ended, and how long the rest takes at this pace."""
        self._done += 1
        pace = (time.monotonic() - self._started) / (self._done - self._known)
        seconds = round(pace * (self._total - self._done))
        left = f"about {seconds // 60}:{seconds % 60:02d} left"
        self._bar.update(self._task, advance=1, left=left)
        said = self._campaign.line(name, result)
        if not said:
            return
        text = f"{verdict(result):4}  {said}  [{self._done}/{self._total}, {left}]"
        self._bar.console.print(text, markup=False, style=_STYLES[result["passed"]])

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table whose second column from the right end is a verdict, if it is one."""
        from rich.table import Table
        from rich.text import Text

        made = Table(title=title, title_style="bold")
        for column in columns:
            made.add_column(column, overflow="fold")
        styles = {"PASS": "green", "FAIL": "bold red", "missing": "bold red"}
        for row in rows:
            made.add_row(*(Text(cell, style=styles.get(cell, "")) for cell in row))
        self.rich.print(made)


def verdict(result: Result | None) -> str:
    """Return PASS, FAIL, "missing" without a result, nothing for what has no bound."""
    return "missing" if result is None else {True: "PASS", False: "FAIL", None: ""}[
        result["passed"]
    ]


def failure(reason: str, seconds: float = 0.0, **more: Any) -> Result:
    """Return the result of a case that has none of its own."""
    return {"passed": False, "reason": reason, "seconds": round(seconds, 2), **more}


def main(campaign: Campaign, argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    try:
        with _sigterm_as_ctrl_c():
            given = parse(campaign, sys.argv[1:] if argv is None else argv)
            return _run(campaign, given)
    except (CampaignError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: stopped; what has ended is kept, run it again to go on", file=sys.stderr)
        return 130


@contextlib.contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """Ranks are ended and the summary is whole after either."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise CampaignError(f"{message.removeprefix('argument ')}; --help lists all options")


def parse(campaign: Campaign, argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line.

    Raises:
        CampaignError: one sentence on what is wrong.
        SystemExit: after ``--help``.
    """
    about = inspect.cleandoc(campaign.__doc__ or "").partition("\n\n")[0]
    program = f"python -m {campaign.module}"
    parser = _Parser(prog=program, allow_abbrev=False, description=about)
    campaign.add_options(parser.add_argument)
    several = campaign.nouns[1]
    parser.add_argument("--out", "--output", type=Path, help="folder of the results")
    parser.add_argument("--fresh", action="store_true", help="forget results of earlier runs")
    parser.add_argument("--list", action="store_true", help=f"print the {several}, run nothing")
    return parser.parse_args(list(argv))


def _run(campaign: Campaign, given: argparse.Namespace) -> int:
    names = list(campaign.choose(given))
    if given.list:
        print("\n".join(names))
        return 0
    folder = given.out or campaign.folder
    keeps = campaign.keeps if campaign.resumes(given) else None
    record = Record(folder, campaign.fingerprint(), keeps)
    left = [name for name in names if name not in record.results]
    with Console(campaign, len(names), len(names) - len(left)) as console:
        if len(left) < len(names):
            console.note(f"{len(names) - len(left)} kept from {folder}; --fresh runs them too")
        written = _run_cases(campaign, names, left, record, console)
    cases = campaign.cases(names, record.results)
    rows = [campaign.row(name, result) for name, result in cases.items()]
    console.table(campaign.title, campaign.columns, rows)
    lines = campaign.close(given, record)
    bad = written["failed"] or written["missing"]
    head = "FAIL" if bad else "PASS" if written["passed"] else "NOT RUN"
    counted = f"{written['passed']} of {len(cases)} {campaign.nouns[1]}"
    if written["not run"]:
        counted += f", {len(written['not run'])} not run"
    print(*lines, sep="\n", end="\n" if lines else "")
    print(f"{head}: {counted}; results are in {folder / SUMMARY}")
    return 1 if bad else 0


def _run_cases(
    campaign: Campaign, names: list[str], left: list[str], record: Record, console: Console
) -> dict[str, Any]:
    """Run what is left, keep every result, and write the summary now and then and at the end."""
    written = 0.0
    try:
        with contextlib.closing(campaign.run(left, console)) as ended:
            for name, result in ended if left else ():
                record.add(name, result)
                if name in names:  # not what cases share
                    console.case(name, result)
                if time.monotonic() - written > _WRITE_S:
                    written = time.monotonic()
                    _write_summary(campaign, names, record)
    except CampaignError:
        raise  # nothing was tried: what an earlier run left stays as it is
    except BaseException:
        _write_summary(campaign, names, record)
        raise
    return _write_summary(campaign, names, record)


def _write_summary(campaign: Campaign, names: Sequence[str], record: Record) -> dict[str, Any]:
    cases = campaign.cases(names, record.results)
    known = {name: result for name, result in cases.items() if result is not None}
    skipped = [name for name, result in known.items() if result.get("ran") is False]
    good = [name for name, result in known.items() if result["passed"] is not False]
    summary = {
        "passed": len(set(good) - set(skipped)),
        "not run": skipped,
        "failed": [name for name, result in known.items() if result["passed"] is False],
        "missing": [name for name in cases if name not in known],
        "settings": campaign.settings(),
        "versions": versions(),
        "fingerprint": record.mark,
        "seconds": round(sum(result.get("seconds", 0.0) for result in known.values()), 1),
        **campaign.summary(),
        "results": known,
    }
    write_whole(record.folder / SUMMARY, json.dumps(summary, indent=1) + "\n")
    return summary
