# SPDX-License-Identifier: Apache-2.0
"""What the user sees: a line per mutant, tables, and the table of ``docs/mutants.md``."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.mutants.campaign import Done
from tests.mutants.mutant import Mutant
from tests.mutants.trial import BROKEN, KILLED, KILLS, SURVIVED, TIMED_OUT

_STYLES = {KILLED: "green", TIMED_OUT: "yellow", SURVIVED: "bold red", BROKEN: "bold magenta"}
_MESSAGE_CHARACTERS = 120
# Where there is no terminal whose width could be asked for.
_LOG_COLUMNS = 140
DOC_START = "<!-- the table below is written by: python -m tests.mutants --write-docs -->"
DOC_END = "<!-- end of the table -->"


def line(done: Done) -> str:
    """One line for a mutant that is done."""
    verdict = done.verdict
    by = f" by {verdict.test}" if verdict.test else ""
    head = f"{verdict.status:21s} {done.mutant.name:42s} {verdict.seconds:6.1f} s"
    return f"{head}{by}: {verdict.message[:_MESSAGE_CHARACTERS]}"


def show_catalogue(mutants: Sequence[Mutant]) -> None:
    """What there is to run."""
    table = _table(f"{len(mutants)} mutants", "ranks", "what it would do")
    for mutant in mutants:
        table.add_row(mutant.name, _short(mutant.file), str(mutant.ranks), mutant.why)
    _print(table)


def show_results(mutants: Sequence[Mutant], results: dict[str, dict[str, Any]]) -> None:
    """The final table."""
    table = _table("Mutants", "status", "seconds", "noticed by")
    for mutant in mutants:
        entry = results[mutant.name]
        status = entry["status"]
        table.add_row(
            mutant.name,
            _short(mutant.file),
            f"[{_STYLES[status]}]{status}[/]",
            f"{entry['seconds']:.1f}",
            _plain(entry["test"].partition("[")[0] or entry["message"]),
        )
    _print(table)


def closing_lines(
    chosen: Sequence[Mutant], results: dict[str, dict[str, Any]], reused: int, catalogue: int
) -> list[str]:
    """How many ran and were killed, and what to do about those that were not."""
    statuses = {mutant.name: results[mutant.name]["status"] for mutant in chosen}
    killed = sum(status in KILLS for status in statuses.values())
    late = sum(status == TIMED_OUT for status in statuses.values())
    lines = [
        f"{len(chosen)} of {catalogue} mutants ({len(chosen) - reused} ran now, {reused} from "
        f"earlier runs on the same code): {killed} killed, {late} of them by a deadline"
    ]
    advice = {
        SURVIVED: "no test notices: write one that does, beside the module's other tests",
        BROKEN: "the mutant itself is wrong, or its tests cannot run: look at its message",
    }
    for status, what in advice.items():
        names = [name for name, its in statuses.items() if its == status]
        if names:
            lines.append(f"{status} ({what}): {', '.join(names)}")
    return lines


def write_docs(path: Path, mutants: Sequence[Mutant], summary: dict[str, Any]) -> None:
    """Put the results into the table of a markdown file.

    Raises:
        ValueError: the file has no place for it, or a mutant has not been run.
    """
    results = {entry["name"]: entry for entry in summary["mutants"]}
    missing = [mutant.name for mutant in mutants if mutant.name not in results]
    if missing:
        raise ValueError(f"not run yet on this code: {', '.join(missing)}; run them first")
    text = path.read_text()
    if text.count(DOC_START) != 1 or text.count(DOC_END) != 1:
        raise ValueError(f"{path} must hold {DOC_START!r} and {DOC_END!r}, once each")
    before, _, rest = text.partition(DOC_START)
    after = rest.partition(DOC_END)[2]
    table = "\n".join(_markdown(mutants, results, summary))
    path.write_text(f"{before}{DOC_START}\n\n{table}\n\n{DOC_END}{after}")


def _markdown(
    mutants: Iterable[Mutant], results: dict[str, dict[str, Any]], summary: dict[str, Any]
) -> list[str]:
    on = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    baseline = summary["baseline"]
    lines = [
        f"{summary['killed']} of {summary['catalogue']} mutants killed, in "
        f"{summary['seconds']:.0f} s of test runs and {baseline['seconds']:.0f} s for the "
        f"{baseline['passed']} tests without a mutant; {summary['cpus']} cores, {on}.",
        "",
        "| mutant | in | what it would do | ranks | s | noticed by |",
        "|---|---|---|---|---|---|",
    ]
    for mutant in mutants:
        entry = results[mutant.name]
        noticed = f"`{entry['test']}`" if entry["test"] else entry["message"]
        if entry["status"] != KILLED:
            noticed = f"**{entry['status']}** {noticed}"
        cells = [f"`{mutant.name}`", f"`{_short(mutant.file)}`", mutant.why, str(mutant.ranks)]
        cells += [f"{entry['seconds']:.0f}", noticed]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title)
    table.add_column("mutant", no_wrap=True)
    for column in ("file", *columns):
        table.add_column(column, overflow="fold")
    return table


def _print(table: Table) -> None:
    Console(width=None if sys.stdout.isatty() else _LOG_COLUMNS).print(table)


def _short(file: str) -> str:
    """The path inside the package."""
    return file.removeprefix("megatron/core/").removeprefix("models/mimo/")


def _plain(text: str) -> str:
    """Brackets of node ids are no markup."""
    return text.replace("[", r"\[")
