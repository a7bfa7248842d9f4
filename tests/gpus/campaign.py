# SPDX-License-Identifier: Apache-2.0
"""What only GPUs can show, as a campaign: a command per check."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from campaigns.command import Campaign, CampaignError, Console, failure, verdict
from campaigns.pages import replace_between
from campaigns.record import ROOT, Record, Result
from tests.gpus.checks import CHECKS, Check
from tests.gpus.measures import FIGURES
from tests.harness.gpus import visible

PAGE = ROOT / "docs" / "gpu.md"
START, END = "<!-- make gpu-check -->", "<!-- end of make gpu-check -->"
_TIMEOUT_S = 3600.0


class Gpus(Campaign):
    """Run what only GPUs can show, on those that are there; without any, say what would run.

    Args:
        gpus: how many are there; ``None`` asks the driver.
        run_one: runs a command; tests put their own in.
    """

    module, title = "tests.gpus", "What only GPUs can show"
    nouns = ("check", "checks")
    columns = ("check", "GPUs", "", "shows", "said")
    code = (*Campaign.code, "tests/gpus/*.py", "tests/harness/*.py", "tests/unit_tests/mimo/*.py")
    folder = Path("runs/gpus")

    def __init__(
        self,
        gpus: int | None = None,
        run_one: Callable[[list[str], Mapping[str, str]], tuple[int, str]] | None = None,
    ) -> None:
        self.gpus = visible(os.environ) if gpus is None else gpus
        self._run_one = run_one or _run
        self._modules = {m for m in {c.module for c in CHECKS.values()} if m and _imports(m)}

    def add_options(self, add: Callable[..., Any]) -> None:
        """See ``--help``."""
        add("--only", default="", help="checks whose name contains this")
        add("--docs", action="store_true", help=f"write the table into {PAGE.name}")

    def choose(self, given: argparse.Namespace) -> Sequence[str]:
        """Checks in order; all, or those that are asked for."""
        chosen = [name for name in CHECKS if given.only in name]
        if not chosen:
            raise CampaignError(f"no check's name contains {given.only!r}; --list shows them")
        if given.docs and (given.only or not self.gpus):
            raise CampaignError("--docs writes what was seen of all checks on a machine with GPUs")
        return chosen

    def run(self, left: Sequence[str], console: Console) -> Iterator[tuple[str, Result]]:
        """Run what this machine can."""
        if not self.gpus:
            console.note("no GPU is here; on a machine with GPUs these would run:")
        for name in left:
            check = CHECKS[name]
            lacks = check.lacks(self.gpus, self._modules)
            if lacks:
                would = " ".join(["python", *check.command(max(self.gpus, check.gpus))])
                yield name, {"passed": None, "ran": False, "reason": lacks, "would run": would}
                continue
            yield name, self._judge(check)

    def _judge(self, check: Check) -> Result:
        before = time.monotonic()
        environment = {**os.environ, **check.environment}
        command = [sys.executable, "-W", "ignore", *check.command(self.gpus)]
        code, said = self._run_one(command, environment)
        seconds = round(time.monotonic() - before, 2)
        lines = [line for line in said.splitlines() if line.strip()]
        last = lines[-1] if lines else "said nothing"
        if code:
            return failure(f"exit code {code}: {last}", seconds)
        figures = next((x for x in reversed(lines) if x.startswith(FIGURES)), None)
        if figures is None:
            return {"passed": True, "reason": last, "seconds": seconds}
        found = json.loads(figures.removeprefix(FIGURES))
        told = ", ".join(f"{key} {value}" for key, value in found.items() if key != "passed")
        return {"passed": found["passed"], "reason": told, "seconds": seconds, "figures": found}

    def row(self, name: str, result: Result | None) -> tuple[str, ...]:
        """A check's cells."""
        check, result = CHECKS[name], result or {}
        return name, str(check.gpus), verdict(result or None), check.shows, result.get("reason", "")

    def line(self, name: str, result: Result) -> str:
        """What ended; or what would run."""
        return f"{name}: {result.get('would run') or result['reason']}"

    def close(self, given: argparse.Namespace, record: Record) -> Sequence[str]:
        """Write the table into the page, if that was asked for."""
        if not given.docs:
            return ()
        lines = ["| " + " | ".join(self.columns) + " |", "|---" * len(self.columns) + "|"]
        for name in CHECKS:
            lines.append("| " + " | ".join(self.row(name, record.results.get(name))) + " |")
        replace_between(PAGE, START, END, "\n".join(lines))
        return (f"table written into {PAGE}",)

    def summary(self) -> dict[str, Any]:
        """How many GPUs there were."""
        return {"gpus": self.gpus}


def _imports(name: str) -> bool:
    try:
        importlib.import_module(name)
    except Exception:  # an installed one that is broken fails in its own ways
        return False
    return True


def _run(command: list[str], environment: Mapping[str, str]) -> tuple[int, str]:
    """Run a command to its end; its exit code and what it said."""
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=dict(environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return 124, f"did not end within {_TIMEOUT_S:g} s"
    return done.returncode, done.stdout
