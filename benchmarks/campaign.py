# SPDX-License-Identifier: Apache-2.0
"""The kinds of measurement as a campaign: cells as they come, a table and a file per kind."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.cases import Pair
from benchmarks.kinds import KINDS, Kind
from campaigns.command import Campaign, CampaignError, Console, verdict
from campaigns.launches import Launch, launch, run_tasks
from campaigns.pages import write_whole
from campaigns.record import Record, Result
from mimo_colocated.launch.errors import JobError

WORK = "benchmarks.work:work"
_NOT_SHOWN = ("passed", "backend", "expected", "curve", "parts_ms", "machine")
# Kind -> what plots its cells.
_PLOTS = {"step": report.plot_steps, "memory-policies": report.plot_memory}


class Benchmarks(Campaign):
    """Measure what the bridges cost, side by side; ratios within one run.

    Args:
        start: makes a launch of ranks; tests put their own in.
    """

    module, nouns, title = "benchmarks", ("kind", "kinds"), "Measured"
    columns = ("kind", "", "cells", "bounds kept", "why")
    folder = Path("runs/bench")

    def __init__(self, start: Launch = launch) -> None:
        self._start = start

    def add_options(self, add: Callable[..., Any]) -> None:
        """See ``--help``."""
        names = ", ".join(kind.name for kind in KINDS)
        add("--only", metavar="KINDS", default="", help=f"of {names}, separated by commas")
        add("--layout", action="append", default=[], metavar="ENCODER/LANGUAGE",
            help="such as tp=2,dp=4/tp=2,cp=2,dp=2; may be given several times")  # fmt: skip
        add("--quick", action="store_true", help="fewer and smaller cells, under a minute")
        add("--backend", choices=("auto", "nccl", "gloo"), default="auto", help="of process groups")
        add("--docs", type=Path, metavar="FILE", help="also replace the tables in this file")
        add("--timeout", type=float, default=300.0, help="seconds for one cell (300)")

    def choose(self, given: argparse.Namespace) -> Sequence[str]:
        """The kinds asked for."""
        self._options = given
        self._out = given.out or self.folder
        self._kinds = {kind.name: kind for kind in _kinds(given.only)}
        self._layouts = _layouts(given.layout)
        self._command = f"python -m benchmarks {' '.join(sys.argv[1:])}".rstrip()
        self._cells: dict[str, list[Result]] = {}
        return list(self._kinds)

    def resumes(self, _given: argparse.Namespace) -> bool:
        """Never: figures of one table are of one run."""
        return False

    def run(self, left: Sequence[str], console: Console) -> Iterator[tuple[str, Result]]:
        """Kinds of one process first, then those on ranks in one launch."""
        for kind in map(self._kinds.get, left):
            if not kind.on_ranks:
                for cell in kind.load().run(self._options.quick):
                    self._cell(kind.name, cell, console)
                yield kind.name, self._finish(kind, {}, console)
        plan = {
            "layouts": [str(pair) for pair in self._layouts],
            "quick": self._options.quick,
            "results": str(self._out.resolve()),
        }
        ended = run_tasks(
            self._layouts[0].world_size if self._layouts else 8,
            [name for name in left if self._kinds[name].on_ranks],
            WORK, plan, self._out / "work", note=console.note, start=self._start,
            on_part=lambda kind, cell: self._cell(kind, cell, console),
            backend=self._options.backend, timeout=self._options.timeout,
        )  # fmt: skip
        for name, result in ended:
            yield name, self._finish(self._kinds[name], result, console)

    def _cell(self, kind: str, cell: Result, console: Console) -> None:
        self._cells.setdefault(kind, []).append(cell)
        named = {k: v for k, v in cell.items() if k not in _NOT_SHOWN}
        fields = "  ".join(f"{name} {report.text(value)}" for name, value in named.items())
        console.note(f"{verdict(cell):4}  {kind}  {fields}")

    def _finish(self, kind: Kind, result: Result, console: Console) -> Result:
        """Table, file and plot of a kind that has ended."""
        cells = self._cells.get(kind.name, [])
        if not cells or "reason" in result:
            return {"passed": False, "reason": result.get("reason", "no result"), "cells": cells}
        console.table(kind.title, *report.table(kind, cells))
        path = self._out / f"{kind.name}.json"
        content = {"title": kind.title, "command": self._command, "machine": report.machine()}
        content |= {"failed": sum(c["passed"] is False for c in cells), "cells": cells}
        write_whole(path, json.dumps(content, indent=1) + "\n")
        if draw := _PLOTS.get(kind.name):
            draw(self._out / f"{kind.name}.png", cells)
        return {"passed": not content["failed"], "cells": cells}

    def row(self, name: str, result: Result | None) -> tuple[str, ...]:
        """A kind's cells of the closing table."""
        result = result or {"cells": []}
        kept = [cell["passed"] for cell in result["cells"] if cell["passed"] is not None]
        bounds = f"{sum(kept)} of {len(kept)}" if kept else ""
        said = verdict(result) if "passed" in result else "missing"
        return name, said, str(len(result["cells"])), bounds, result.get("reason", "")

    def close(self, given: argparse.Namespace, record: Record) -> Sequence[str]:
        """Tables and plots of a document, if one is given."""
        if given.docs is not None:
            self._write_docs(given.docs, record)
        every = [cell["passed"] for r in record.results.values() for cell in r["cells"]]
        kept, failed = every.count(True), every.count(False)
        return [f"{kept} of {kept + failed} bounds kept"]

    def _write_docs(self, page: Path, record: Record) -> None:
        """Replace the table of each kind, between its marks; a page without a place stays."""
        try:
            text = page.read_text()
        except OSError as error:
            raise CampaignError(f"--docs {page} cannot be read: {error.strerror}") from error
        for name, result in record.results.items():
            kind = self._kinds[name]
            place = re.compile(rf"(<!-- bench: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
            table = "\n".join([*report.markdown(kind, result["cells"]), "",
                               report.source(self._command), ""])  # fmt: skip
            text = place.sub(lambda found, table=table: found[1] + table + found[2], text)
            if draw := _PLOTS.get(name):
                draw(page.with_name(f"{page.stem}_{name}.png"), result["cells"])
        write_whole(page, text)


def _kinds(only: str) -> list[Kind]:
    wanted = [name.strip() for name in only.split(",") if name.strip()]
    known = [kind.name for kind in KINDS]
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise CampaignError(f"--only {unknown[0]!r} is not measured; there are {', '.join(known)}")
    return [kind for kind in KINDS if not wanted or kind.name in wanted]


def _layouts(texts: Sequence[str]) -> list[Pair]:
    try:
        pairs = [Pair.parse(text) for text in texts]
    except JobError as error:
        raise CampaignError(str(error)) from error
    sizes = sorted({pair.world_size for pair in pairs})
    if len(sizes) > 1:
        raise CampaignError(
            f"--layout: all pairs must span the same number of ranks, got {sizes}; run the command "
            "once per number"
        )
    return pairs
