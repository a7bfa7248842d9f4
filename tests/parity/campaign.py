# SPDX-License-Identifier: Apache-2.0
"""The rows as a campaign: options, references before rows, the line and the cells of a row."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from campaigns.command import Campaign, CampaignError, Console, failure, verdict
from campaigns.launches import Launch, launch, run_tasks
from campaigns.pages import write_whole
from campaigns.record import Record, Result
from tests.parity import docs
from tests.parity.rows import CHANGE_STEPS, DEFAULT_ROWS, NIGHTLY_ROWS, Reference, Row, choose

WORK = "tests.parity.work:work"


def whole_number(low: int) -> Callable[[str], int]:
    """A parser of whole numbers from ``low`` to 10000."""

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdecimal() and low <= int(text) <= 10_000):
            raise argparse.ArgumentTypeError(
                f"must be a whole number from {low} to 10000, got {text!r}"
            )
        return int(text)

    return parse


def positive(text: str) -> float:
    """Parse a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


class Parity(Campaign):
    """Compare parallel runs with the same model on one process, unsharded.

    Args:
        start: makes a launch of ranks; tests put their own in.
        environment: where the command line says nothing.
    """

    module, nouns = "tests.parity", ("row", "rows")
    title = "Parity with one process"
    columns = ("row", "", "worst error", "allowed", "in")
    code = (*Campaign.code, "examples/mimo/digits/*.py", "tests/models/*.py", "tests/parity/*.py")
    folder = Path("runs/parity")

    def __init__(
        self, start: Launch = launch, environment: Mapping[str, str] = os.environ
    ) -> None:
        self._start, self._environment = start, environment
        self._references: dict[str, str] = {}

    def add_options(self, add: Callable[..., Any]) -> None:
        """See ``--help``."""
        add("--thresh", metavar="THRESH", help="bound of fp32 losses and weights (1e-4)")
        add("--train-steps", metavar="TRAIN_STEPS", help="training steps of each row (10)")
        add("--micro-batches", metavar="MICRO_BATCHES", help="of rows that leave it open (8)")
        add("--layouts", metavar="LAYOUTS", help="rows by name or pattern, separated by commas")
        add("--nightly", action="store_true", help="every pair of 8-rank layouts, and resume")
        add("--docs", type=Path, metavar="FILE", help="also write the table and how to read it")
        add("--backend", choices=("auto", "nccl", "gloo"), default="auto", help="of process groups")
        add("--row-timeout", type=positive, default=180.0, help="seconds for one row (180)")

    def choose(self, given: argparse.Namespace) -> Sequence[str]:
        """The rows asked for; the backend is the same for references and rows.

        Generators of a GPU and of the CPU give different numbers: initial weights would differ.
        """
        table = NIGHTLY_ROWS if given.nightly else DEFAULT_ROWS
        layouts = given.layouts or self._environment.get("LAYOUTS", "")
        try:
            rows = choose(table, layouts.replace(",", " ").split())
        except ValueError as error:
            raise CampaignError(str(error)) from error
        self.rows = {row.name: row for row in rows}
        self.thresh = self._value("THRESH", given.thresh, positive, "1e-4")
        self.steps = self._value("TRAIN_STEPS", given.train_steps, whole_number(CHANGE_STEPS), "10")
        self.micro_batches = self._value("MICRO_BATCHES", given.micro_batches, whole_number(1), "8")
        self.backend = "" if given.list else one_backend(given.backend, rows)
        self._timeout = given.row_timeout
        if given.nightly:
            self.folder = Path("runs/parity-nightly")
        self.work = (given.out or self.folder) / "work"
        return list(self.rows)

    def _value(
        self, name: str, flag: str | None, parse: Callable[[str], Any], default: str
    ) -> Any:
        text = self._environment.get(name, default) if flag is None else flag
        try:
            return parse(text or default)
        except argparse.ArgumentTypeError as error:
            raise CampaignError(f"{name} {error}") from error

    def resumes(self, given: argparse.Namespace) -> bool:
        """The nightly table only: it takes hours."""
        return given.nightly and not given.fresh

    def settings(self) -> dict[str, Any]:
        """The options that decide what a row's result is."""
        return {
            "THRESH": self.thresh,
            "TRAIN_STEPS": self.steps,
            "MICRO_BATCHES": self.micro_batches,
            "backend": self.backend,
        }

    def run(self, left: Sequence[str], console: Console) -> Iterator[tuple[str, Result]]:
        """References on one process, then one launch per world size."""
        (self.work / "references").mkdir(parents=True, exist_ok=True)
        for path in (self.work / "references").glob("*.pt"):
            path.unlink()  # of other code, perhaps
        rows = [self.rows[name] for name in left]
        references = {self.reference(row).name: None for row in rows}
        failed = {}
        for name, result in self._launch(1, list(references), console):
            console.note(f"{name}: {result.get('reason') or 'measured on one process'}")
            if "reason" in result:
                failed[name] = f"its reference failed: {result['reason']}"
        for row in rows:
            if reason := failed.get(self.reference(row).name):
                yield row.name, failure(reason, checks=[])
        ready = [row for row in rows if self.reference(row).name not in failed]
        for world in sorted({row.world_size for row in ready}):
            names = [row.name for row in ready if row.world_size == world]
            yield from self._launch(world, names, console)

    def _launch(
        self, world: int, tasks: list[str], console: Console
    ) -> Iterator[tuple[str, Result]]:
        plan = {"references": str(self.work / "references"), **self.settings()}
        return run_tasks(
            world, tasks, WORK, plan, self.work / f"ranks-{world}", note=console.note,
            start=self._start, backend=self.backend, timeout=self._timeout,
        )  # fmt: skip

    def reference(self, row: Row) -> Reference:
        """What a row is compared with."""
        return row.reference(self.micro_batches)

    def row(self, name: str, result: Result | None) -> tuple[str, ...]:
        """(row, verdict, worst error, allowed, where)."""
        if result is None:
            return name, "FAIL", "", "", "missing: it has no result"
        if result.get("reason"):
            return name, "FAIL", "", "", result["reason"]
        worst = headline(result["checks"])
        error = worst["error"] if worst["error"] is not None else float("inf")
        where = worst["kind"]
        where += "" if worst["where"] == worst["kind"] else f": {worst['where']}"
        return name, verdict(result), f"{error:.1e}", f"{worst['allowed']:.0e}", where

    def line(self, name: str, result: Result) -> str:
        """One row as it finishes."""
        _, _, error, allowed, where = self.row(name, result)
        figures = f"{error} of {allowed} in " if error else ""
        return f"{name}  {figures}{where}  ({result.get('seconds', 0.0):.1f} s)"

    def close(self, given: argparse.Namespace, record: Record) -> Sequence[str]:
        """Write the page if it is asked for."""
        if given.docs is not None:
            write_whole(given.docs, docs.page(self, record.results))
        return ()


def one_backend(wanted: str, rows: Sequence[Row]) -> str:
    """The backend for all launches.

    Raises:
        CampaignError: NCCL is asked for and the widest row has more ranks than there are GPUs.
    """
    import torch

    from mimo_colocated.launch import JobError, choose_backend

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    try:
        return choose_backend(wanted, max(row.world_size for row in rows), gpus)
    except JobError as error:
        raise CampaignError(str(error)) from error


def headline(checks: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The check to show: the worst, where a fall of the loss counts only if it did not happen."""
    first = checks[0]
    if first["kind"] != "loss falls":
        return first
    falls_well = first["error"] is not None and first["error"] <= first["allowed"]
    return checks[1] if falls_well and len(checks) > 1 else first
