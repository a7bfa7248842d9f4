# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks``: exit code 0, 1 if a bound is missed or a kind has no result, or 2."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from errors import JobError, require_packages

from benchmarks import docs, report
from benchmarks.kinds import Kind
from benchmarks.options import Options, parse
from benchmarks.ranks import Plan
from tests.parity.runner import LaunchFailed, RanksLaunch, Start

_SCRIPT = Path(__file__).with_name("ranks.py")
_NOT_SHOWN = ("passed", "backend", "expected", "curve")
# Kind -> what draws a picture of its cells.
_PICTURES = {"step": report.plot_steps, "memory-policies": report.plot_memory}


class BenchLaunch(RanksLaunch):
    """One start of the ranks, for all kinds that need them."""

    script = _SCRIPT


class Results:
    """Cells by kind, written and shown as the kinds end."""

    def __init__(self, options: Options, command: str) -> None:
        from rich.console import Console

        self._options, self._command = options, command
        self._console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
        self.cells: dict[str, list[dict[str, Any]]] = {kind.name: [] for kind in options.kinds}

    def add(self, kind: str, cell: dict[str, Any]) -> None:
        """One more cell; a line of it."""
        self.cells[kind].append(cell)
        named = {k: v for k, v in cell.items() if k not in _NOT_SHOWN}
        fields = "  ".join(f"{name} {report.text(value)}" for name, value in named.items())
        print(f"{report.verdict(cell):4}  {kind}  {fields}", flush=True)

    def finish(self, kind: Kind) -> None:
        """File, picture and table of a kind."""
        cells, folder = self.cells[kind.name], self._options.out
        if not cells:
            return
        path = report.write_json(folder, kind, cells, self._command)
        if self._options.docs is not None:
            docs.update(self._options.docs, kind, cells, self._command)
        if draw := _PICTURES.get(kind.name):
            draw(folder / f"{kind.name}.png", cells)
            if self._options.docs is not None:
                page = self._options.docs
                draw(page.with_name(f"{page.stem}_{kind.name}.png"), cells)
        self._console.print(report.table(kind, kind.load().COLUMNS, cells))
        print(f"written to {path}\n", flush=True)

    def close(self) -> int:
        """The last line; the exit code."""
        missing = [name for name, cells in self.cells.items() if not cells]
        every = [cell["passed"] for cells in self.cells.values() for cell in cells]
        kept, failed = every.count(True), every.count(False)
        verdict = "FAIL" if failed or missing else "PASS"
        without = f"; no result of {', '.join(missing)}" if missing else ""
        print(f"{verdict}: {kept} of {kept + failed} bounds kept{without}")
        return int(verdict == "FAIL")


def main(argv: Sequence[str] | None = None, start: Start = BenchLaunch) -> int:
    """Measure; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        options = parse(argv)
        require_packages()
        return _run(options, shlex.join(["python", "-m", "benchmarks", *argv]), start)
    except JobError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: stopped by SIGINT; kinds that had ended are written", file=sys.stderr)
        return 130


def _run(options: Options, command: str, start: Start) -> int:
    results = Results(options, command)
    for kind in options.kinds:
        if not kind.on_ranks:
            for cell in kind.load().run(options.quick):
                results.add(kind.name, cell)
            results.finish(kind)
    try:
        for kind, cell in _on_ranks(options, start):
            if cell is None:
                results.finish(kind)
            else:
                results.add(kind.name, cell)
    except LaunchFailed as error:
        print(f"error: {error}", file=sys.stderr)
        results.close()
        return 1
    return results.close()


def _on_ranks(options: Options, start: Start) -> Iterator[tuple[Kind, dict[str, Any] | None]]:
    """(kind, cell) as they come, (kind, None) when a kind is complete."""
    kinds = {kind.name: kind for kind in options.kinds if kind.on_ranks}
    if not kinds:
        return
    plan = Plan(
        world_size=options.world_size,
        kinds=tuple(kinds),
        layouts=tuple(str(pair) for pair in options.layouts),
        quick=options.quick,
        backend=options.backend,
        results=str(options.out.resolve()),
    )
    current: Kind | None = None
    for record in start(plan, options.out / "work", options.timeout).records():
        if "started" in record:
            if current is not None:
                yield current, None
            current = kinds[record["started"]]
        else:
            yield kinds[record["finished"]], record["result"]
    if current is not None:
        yield current, None


if __name__ == "__main__":
    sys.exit(main())
