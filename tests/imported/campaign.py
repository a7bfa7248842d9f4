# SPDX-License-Identifier: Apache-2.0
"""Models and layouts as a campaign: a row is a model in a layout."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from campaigns.command import Campaign, CampaignError, Console, verdict
from campaigns.launches import Launch, launch, run_tasks
from campaigns.pages import replace_between
from campaigns.record import ROOT, Record, Result
from tests.imported.plan import Row, rows
from tests.unit_tests.mimo.huggingface.harness import GRADIENTS, LOGITS

WORK = "tests.imported.work:work"
PAGE = ROOT / "docs" / "models.md"
START, END = "<!-- make models -->", "<!-- end of make models -->"


class Imported(Campaign):
    """Logits and every gradient of models from folders against transformers' own.

    Args:
        start: makes a launch of ranks; tests put their own in.
    """

    module, title = "tests.imported", "Models from Hugging Face folders against transformers"
    columns = ("model", "layout", "", "logits", "worst gradient", "of")
    code = (
        *Campaign.code,
        "tests/imported/*.py",
        "tests/unit_tests/mimo/huggingface/*.py",
    )
    folder = Path("runs/models")

    def __init__(self, start: Launch = launch) -> None:
        self._start = start
        self._rows = {str(row): row for row in rows()}

    def add_options(self, add: Callable[..., Any]) -> None:
        """See ``--help``."""
        add("--only", default="", help="rows whose name contains this")
        add("--docs", action="store_true", help=f"write the table into {PAGE.name}")

    def choose(self, given: argparse.Namespace) -> Sequence[str]:
        """Rows in order; all, or those that are asked for."""
        self._out = given.out or self.folder
        chosen = [name for name in self._rows if given.only in name]
        if not chosen:
            raise CampaignError(f"no row's name contains {given.only!r}; --list shows them")
        if given.docs and given.only:
            raise CampaignError("--docs writes the whole table; leave out --only")
        return chosen

    def run(self, left: Sequence[str], console: Console) -> Iterator[tuple[str, Result]]:
        """Run the rows, those of one world size in one launch."""
        for world in sorted({self._rows[name].world for name in left}):
            here = [name for name in left if self._rows[name].world == world]
            yield from run_tasks(
                world, here, WORK, {}, self._out / f"ranks-{world}",
                note=console.note, start=self._start,
            )  # fmt: skip

    def row(self, name: str, result: Result | None) -> tuple[str, ...]:
        """A row's cells."""
        row: Row = self._rows[name]
        result = result or {}
        if "logits" not in result:
            reason = str(result.get("reason", "")).split("\n")[0]
            return row.model, row.layout, verdict(result or None), "", "", reason
        figures = f"{result['logits']:.1e}", f"{result['gradient']:.1e}", result["tensor"]
        return row.model, row.layout, verdict(result), *figures

    def close(self, given: argparse.Namespace, record: Record) -> Sequence[str]:
        """Write the table into the page, if that was asked for."""
        if not given.docs:
            return ()
        lines = ["| " + " | ".join(self.columns) + " |", "|---" * len(self.columns) + "|"]
        for name in self._rows:
            lines.append("| " + " | ".join(self.row(name, record.results.get(name))) + " |")
        replace_between(PAGE, START, END, "\n".join(lines))
        return (f"table written into {PAGE}",)

    def summary(self) -> dict[str, Any]:
        """What was allowed."""
        return {"logits": LOGITS, "gradients": GRADIENTS}
