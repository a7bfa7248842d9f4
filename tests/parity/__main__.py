# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.parity``: exit code 0 if all rows pass, 1 if one fails or is missing, or 2."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from errors import JobError, require_packages

from tests.parity import docs
from tests.parity.options import OptionError, Options, parse
from tests.parity.runner import RanksLaunch, Runner, Start
from tests.parity.summary import Summary, fingerprint, line, table

# Columns of the table in a log file: a name of a tensor on one line.
_LOG_WIDTH = 160


class Console:
    """One line per row, a bar with the time left below them on a terminal."""

    def __init__(self, options: Options, total: int) -> None:
        from rich.console import Console as RichConsole
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
        )

        self.console = RichConsole(highlight=False, soft_wrap=True)
        if not self.console.is_terminal:
            self.console.width = _LOG_WIDTH
        self._rows = {row.name: row for row in options.rows}
        self._started, self._done, self._total = time.monotonic(), 0, total
        self._bar = Progress(
            TextColumn("parity"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._bar.add_task("rows", total=total, left="")
        self._bar.start()

    def note(self, text: str) -> None:
        """What is no row."""
        self._bar.console.print(f"      {text}", markup=False, style="dim")

    def row(self, name: str, result: dict[str, Any]) -> None:
        """A finished row, and how long the rest will take at this pace."""
        self._done += 1
        elapsed = time.monotonic() - self._started
        seconds = round(elapsed / self._done * (self._total - self._done))
        left = f"about {seconds // 60}:{seconds % 60:02d} left"
        self._bar.update(self._task, advance=1, left=left)
        text = f"{line(self._rows[name], result)}  [{self._done}/{self._total}, {left}]"
        style = "green" if result["passed"] else "bold red"
        self._bar.console.print(text, markup=False, style=style)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.stop()


def main(argv: Sequence[str] | None = None, start: Start = RanksLaunch) -> int:
    """Run the suite; returns the exit code."""
    # As Ctrl-C does, so that the ranks are ended and the summary is whole.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return _main(argv, start)
    finally:
        signal.signal(signal.SIGTERM, before)


def _main(argv: Sequence[str] | None, start: Start) -> int:
    try:
        options = parse(sys.argv[1:] if argv is None else argv)
        if options is None:
            return 0
        require_packages()
        return _run(one_backend(options), start)
    except (OptionError, JobError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: stopped; finished rows are in the summary", file=sys.stderr)
        return 130


def one_backend(options: Options) -> Options:
    """The same backend, and so the same kind of device, for the references and all rows.

    Generators of a GPU and of the CPU give different numbers: initial weights would differ.

    Raises:
        JobError: NCCL is asked for and the widest row has more ranks than there are GPUs.
    """
    import torch
    from launch import choose_backend

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    ranks = max(row.world_size for row in options.rows)
    return replace(options, backend=choose_backend(options.backend, ranks, gpus))


def _run(options: Options, start: Start) -> int:
    summary = Summary(options, fingerprint(options))
    rows = summary.left()
    console = Console(options, len(rows))
    if summary.results:
        console.note(f"{len(summary.results)} rows kept from {summary.path}; --fresh runs them too")
    summary.write()
    try:
        if rows:
            Runner(options, _teller(summary, console), console.note, start).run(rows)
    finally:
        console.close()
    console.console.print(table(options.rows, summary.results))
    if options.docs is not None:
        docs.write(options.docs, options, summary)
    good = sum(r["passed"] for r in summary.results.values())
    verdict = "PASS" if summary.passed else "FAIL"
    print(f"{verdict}: {good} of {len(options.rows)} rows; results are in {summary.path}")
    return 0 if summary.passed else 1


def _teller(summary: Summary, console: Console) -> Any:
    def tell(name: str, result: dict[str, Any]) -> None:
        summary.add(name, result)
        console.row(name, result)

    return tell


if __name__ == "__main__":
    sys.exit(main())
