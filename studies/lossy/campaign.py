# SPDX-License-Identifier: Apache-2.0
"""``mimo study lossy``: the cells of a set, one after the other; stopped and gone on with."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from campaigns.command import Campaign, CampaignError, Console, failure, verdict
from campaigns.launches import Launch, launch, run_tasks
from campaigns.pages import replace_between, write_whole
from campaigns.record import ROOT, Record, Result, versions
from studies.lossy import results as said
from studies.lossy.grid import GPT2, SETS, WORLD, Cell, cells

WORK = "studies.lossy.work:work"
PAGE = ROOT / "docs" / "lossy.md"
START, END = "<!-- mimo study lossy -->", "<!-- end of mimo study lossy -->"
# 60 steps of the classifier took 24 to 38 s on two cores that other work kept busy.
_PATIENCE_S = 1800.0


class LossyStudy(Campaign):
    """Train the same models with packets lost at several rates, in bursts or not, and compare.

    Args:
        start: makes a launch of ranks; tests put their own in.
        page: that ``--docs`` writes into; pictures and JSON lie beside it.
    """

    module, title = "studies.lossy", "What training tolerates when packets are lost"
    nouns = ("run", "runs")
    columns = ("run", "", "accuracy", "held-out loss", "seconds")
    code = (*Campaign.code, "studies/**/*.py")
    folder = Path("runs/lossy")

    def __init__(self, start: Launch = launch, page: Path = PAGE) -> None:
        self._start, self._page = start, page

    def add_options(self, add: Callable[..., Any]) -> None:
        """See ``--help``."""
        add("--set", choices=list(SETS), default="shipped", help="which cells run")
        add("--docs", action="store_true", help=f"write the results into {PAGE.name} and beside it")

    def choose(self, given: argparse.Namespace) -> Sequence[str]:
        """The cells of the set."""
        self._set, self._out = given.set, given.out or self.folder
        self._cells = {str(cell): cell for cell in cells(given.set)}
        return list(self._cells)

    def run(self, left: Sequence[str], console: Console) -> Iterator[tuple[str, Result]]:
        """The classifier's cells in one launch of 8 ranks; then the others, a command each."""
        ours = [name for name in left if self._cells[name].subject == GPT2]
        plan = {name: asdict(self._cells[name]) for name in ours}
        yield from run_tasks(
            WORLD, ours, WORK, plan, self._out / "ranks",
            note=console.note, start=self._start, backend="gloo", timeout=_PATIENCE_S,
        )  # fmt: skip
        from studies.lossy.work import run_easy_vqa

        for name in left:
            if name not in plan:
                try:
                    yield name, run_easy_vqa(self._cells[name], self._out / _folder(name))
                except RuntimeError as error:
                    yield name, failure(str(error))

    def cases(
        self, names: Sequence[str], results: Mapping[str, Result]
    ) -> dict[str, Result | None]:
        """Every cell; one that sends again fails if it did not train as without loss."""
        found: dict[str, Result | None] = {}
        known = self._known(results)
        for name in names:
            result = results.get(name)
            if result and "losses" in result:
                same = said.same_as_lossless(self._cells[name], known)
                if same is False:
                    reason = "losses differ from those of the run that loses nothing"
                    result = {**result, "passed": False, "reason": reason}
            found[name] = result
        return found

    def row(self, name: str, result: Result | None) -> tuple[str, ...]:
        """A cell's row."""
        result = result or {}
        if "accuracy" not in result:
            reason = str(result.get("reason", "")).split("\n")[0]
            return name, verdict(result or None), reason, "", ""
        figures = f"{result['accuracy']:.3f}", f"{result['held_out_loss']:.3f}"
        return name, verdict(result), *figures, f"{result['seconds']:.0f}"

    def close(self, given: argparse.Namespace, record: Record) -> Sequence[str]:
        """Print settings over seeds, and write the page if that was asked for."""
        results = self._known(record.results)
        found = said.settings(results)
        lines = [said.table(found), "", said.times(found)]
        if not given.docs:
            return lines
        missing = len(self._cells) - len(results)
        if missing:
            raise CampaignError(
                f"{missing} of {len(self._cells)} runs have no result yet, and --docs writes whole "
                "sets; run it again to go on"
            )
        self._write(found, results)
        return [*lines, "", f"written into {self._page}, with pictures and JSON beside it"]

    def _known(self, results: Mapping[str, Result]) -> dict[Cell, Result]:
        return {
            cell: results[name]
            for name, cell in self._cells.items()
            if "accuracy" in results.get(name, {})
        }

    def _write(self, found: Sequence[said.Setting], results: Mapping[Cell, Result]) -> None:
        from studies.lossy import pictures

        folder = self._page.parent
        seconds = sum(result["seconds"] for result in results.values())
        text = {
            "set": self._set,
            "runs": len(results),
            "ranks": WORLD,
            "seconds": round(seconds),
            "versions": versions(),
            "settings": said.as_json(found),
        }
        write_whole(folder / "lossy_study.json", json.dumps(text, indent=1) + "\n")
        pictures.accuracies(folder / "lossy_accuracy.png", found)
        pictures.curves(folder / "lossy_curves.png", found)
        head = (
            f"Set `{self._set}`: {len(results)} runs on {WORLD} gloo ranks, {seconds / 60:.0f} "
            "minutes of them in all. ± is half of the 95 % interval over seeds."
        )
        shown = (
            "![Held-out accuracy against the rate](lossy_accuracy.png)\n\n"
            "![Training loss by step](lossy_curves.png)"
        )
        parts = [head, said.table(found), shown, said.times(found)]
        replace_between(self._page, START, END, "\n\n".join(parts))


def _folder(name: str) -> str:
    kept = (letter if letter.isalnum() else "-" for letter in name)
    return "".join(kept)
