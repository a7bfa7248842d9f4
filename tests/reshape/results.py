# SPDX-License-Identifier: Apache-2.0
"""What is known so far: kept line by line, judged, put into ``summary.json`` and a table."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

from tests.reshape.plan import Case, Task

ROOT = Path(__file__).resolve().parents[2]
RESULTS = "results.jsonl"
SUMMARY = "summary.json"
# Two layouts sum the same numbers in another order: 1e-7 of each sum, which Adam's first steps,
# that divide a gradient by its own size, pass on to the weights. The worst of the usual set was
# 2.6e-7; ten times that leaves room for other machines. What is to be found is far larger: one
# tensor's moment lost changes the losses by 1e-3 of themselves, a learning rate of one step earlier
# by 2e-3, other data, all moments or the step count by 1e-2 and more.
TOLERANCE = 3e-6
# What results depend on; they are forgotten when any of it changes.
_CODE = (
    "megatron/**/*.py",
    "mimo_colocated/*.py",
    "examples/mimo/digits/*.py",
    "tests/parity/*.py",
    "tests/reshape/*.py",
    "tests/unit_tests/mimo/digits_runs.py",
)


@dataclass(frozen=True)
class Verdict:
    """What became of a case.

    Attributes:
        status: "PASS", "FAIL" or "missing" (not run).
        worst: largest difference of a loss to the uninterrupted run's, relative; None if unknown.
        reason: why it failed, in one line.
    """

    status: str
    worst: float | None = None
    reason: str = ""


def fingerprint() -> str:
    """Changes with the code and the versions that results depend on."""
    versions = [platform.python_version(), version("torch"), version("megatron-core")]
    digest = hashlib.sha256(json.dumps(versions).encode())
    for files in _CODE:
        for path in sorted(ROOT.glob(files)):
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


class Results:
    """Results by key; ranks add to the file, the command reads it again and again.

    Args:
        out: folder of the run.
        mark: :func:`fingerprint` of this run; results with another one are not used.
    """

    def __init__(self, out: Path, mark: str) -> None:
        self.path, self.mark, self._read = out / RESULTS, mark, 0
        self.by_key: dict[str, dict[str, Any]] = {}
        if not self._is_mine():
            out.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps({"fingerprint": mark}) + "\n")
        self._end_line()
        self.read()

    def _is_mine(self) -> bool:
        try:
            with self.path.open() as file:
                return json.loads(file.readline()) == {"fingerprint": self.mark}
        except (OSError, ValueError):
            return False

    def read(self) -> list[str]:
        """Take in what is new; returns its keys. A line that is cut short is not there yet."""
        with self.path.open("rb") as file:
            file.seek(self._read)
            text = file.read()
        text = text[: text.rfind(b"\n") + 1]
        self._read += len(text)
        new = []
        for line in text.splitlines():
            try:
                result = json.loads(line)
                key = result.pop("key")
            except (ValueError, KeyError):
                continue  # cut short by a kill, or the first line
            if key not in self.by_key:
                new.append(key)
            self.by_key[key] = result
        return new

    def add(self, key: str, **result: Any) -> None:
        """Add one of the command's own: a task that brought its launch down."""
        self._end_line()
        with self.path.open("a") as file:
            file.write(json.dumps({"key": key, **result}) + "\n")

    def _end_line(self) -> None:
        """What is added next does not go on with a line that a kill has cut short."""
        if not self.path.read_bytes().endswith(b"\n"):
            with self.path.open("a") as file:
                file.write("\n")

    def is_done(self, task: Task, checkpoints: Path) -> bool:
        """Whether its losses are known and what it saves is there."""
        result = self.by_key.get(task.key, {})
        kept = task.save is None or any((checkpoints / task.save).glob("step_*"))
        return "losses" in result and kept

    def forget_failures(self) -> None:
        """Failed tasks are tried again when the command is."""
        self.by_key = {k: r for k, r in self.by_key.items() if "losses" in r}

    def judge(self, case: Case) -> Verdict:
        """Compare the losses of a case with those of the run that was not interrupted."""
        keys = [f"{case.key}.{stop}" for stop in range(1, len(case.places) - 1)]
        keys = [case.places[0].key, *keys, case.key]
        for key in keys:
            if "error" in self.by_key.get(key, {}):
                return Verdict("FAIL", reason=self.by_key[key]["error"].splitlines()[0])
        if any(key not in self.by_key for key in keys):
            return Verdict("missing")
        found = [loss for key in keys[1:] for loss in self.by_key[key]["losses"]]
        return compare(found, self.by_key[keys[0]]["losses"][: len(found)], exact=case.exact)


def compare(found: list[float], wanted: list[float], *, exact: bool) -> Verdict:
    """Judge losses of a case against the uninterrupted run's."""
    if len(found) != len(wanted) or not found:
        return Verdict("FAIL", reason=f"{len(found)} losses, {len(wanted)} to compare with")
    differences = [abs(a - b) / abs(b) for a, b in zip(found, wanted, strict=True)]
    worst, limit = max(differences), 0.0 if exact else TOLERANCE
    if all(difference <= limit for difference in differences):  # false for nan
        return Verdict("PASS", worst)
    step = next(i for i, difference in enumerate(differences) if not difference <= limit)
    return Verdict(
        "FAIL",
        worst,
        f"loss {step + 1} after the checkpoint is {found[step]:.9g}, uninterrupted it is "
        f"{wanted[step]:.9g}; a relative difference of {differences[step]:.1e}, allowed is "
        f"{limit:.0e}",
    )


def line(case: Case, verdict: Verdict) -> str:
    """One line for the console."""
    worst = "" if verdict.worst is None else f"  worst {verdict.worst:.1e}"
    reason = f"  {verdict.reason}" if verdict.reason else ""
    return f"{verdict.status:4}  {case}{worst}{reason}"


def write_summary(
    path: Path, verdicts: dict[Case, Verdict], name: str, seconds: float
) -> dict[str, Any]:
    """Write ``summary.json``, whole or not at all; returns what it holds."""
    count = {
        status: sum(v.status == status for v in verdicts.values())
        for status in ("PASS", "FAIL", "missing")
    }
    known = [v.worst for v in verdicts.values() if v.worst is not None]
    summary = {
        "set": name,
        "passed": count["PASS"],
        "failed": count["FAIL"],
        "missing": count["missing"],
        "tolerance": TOLERANCE,
        "worst": max(known, default=None),
        "seconds": round(seconds, 1),
        "versions": {n: version(n) for n in ("torch", "megatron-core")},
        "cases": [
            {
                "places": [str(place) for place in case.places],
                "optimizer": "sharded" if case.places[0].distributed else "whole",
                "exact": case.exact,
                "status": verdict.status,
                "worst": verdict.worst,
                "reason": verdict.reason,
            }
            for case, verdict in verdicts.items()
        ],
    }
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(summary, indent=2) + "\n")
    os.replace(partial, path)
    return summary


def print_table(verdicts: dict[Case, Verdict], stream: TextIO) -> None:
    """The table: failures and missing ones last, where they are seen."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="A run saved at … continues at …", title_style="bold")
    for name in ("saved", "continued", "optimizer", "worst", ""):
        table.add_column(name, overflow="fold")
    order = sorted(verdicts.items(), key=lambda item: item[1].status != "PASS")
    for case, verdict in order:
        worst = "" if verdict.worst is None else f"{verdict.worst:.1e}"
        worst = "equal" if verdict.worst == 0 else worst
        table.add_row(
            str(case.places[0]),
            " -> ".join(map(str, case.places[1:])),
            "sharded" if case.places[0].distributed else "whole",
            worst,
            verdict.status,
        )
    Console(file=stream).print(table)
