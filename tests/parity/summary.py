# SPDX-License-Identifier: Apache-2.0
"""``summary.json``, the line of a finished row, and the final table."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tests.parity.options import Options
from tests.parity.rows import Row

ROOT = Path(__file__).resolve().parents[2]
_CODE = ("megatron", "examples/mimo/digits", "tests/parity")
_PACKAGES = ("torch", "megatron-core", "numpy", "scikit-learn")

Results = dict[str, dict[str, Any]]


def versions() -> dict[str, str]:
    """Of what the results depend on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def fingerprint(options: Options, root: Path = ROOT) -> str:
    """Changes with the code, the options and the versions that results depend on."""
    digest = hashlib.sha256(json.dumps([options.as_dict(), versions()], sort_keys=True).encode())
    for folder in _CODE:
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


class Summary:
    """Results by row, written to disk after every one.

    Args:
        options: the user's.
        mark: :func:`fingerprint` of this run.
    """

    def __init__(self, options: Options, mark: str) -> None:
        self.options, self.mark = options, mark
        self.path = options.out / "summary.json"
        self.results: Results = self._kept() if options.resume else {}

    def _kept(self) -> Results:
        """Passed rows of an earlier run with the same fingerprint."""
        try:
            earlier = json.loads(self.path.read_text())
            rows = earlier["rows"] if earlier["fingerprint"] == self.mark else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}
        asked = {row.name for row in self.options.rows}
        return {n: r for n, r in rows.items() if n in asked and r.get("passed") is True}

    def left(self) -> list[Row]:
        """Rows without a result."""
        return [row for row in self.options.rows if row.name not in self.results]

    @property
    def passed(self) -> bool:
        """Every row is there and has passed."""
        results = self.results
        return all(results.get(row.name, {}).get("passed") is True for row in self.options.rows)

    def add(self, name: str, result: dict[str, Any]) -> None:
        """Take a result and write the file."""
        self.results[name] = result
        self.write()

    def write(self) -> None:
        """Replace ``summary.json``, all of it or nothing."""
        from report import write_summary

        write_summary(self.path, self.as_dict())

    def as_dict(self) -> dict[str, Any]:
        """The file's content."""
        order = [row.name for row in self.options.rows]
        return {
            "passed": self.passed,
            "failed": [n for n in order if n in self.results and not self.results[n]["passed"]],
            "missing": [row.name for row in self.left()],
            "options": self.options.as_dict(),
            "nightly": self.options.nightly,
            "versions": versions(),
            "fingerprint": self.mark,
            "seconds": round(sum(r.get("seconds", 0.0) for r in self.results.values()), 1),
            "rows": {name: self.results[name] for name in order if name in self.results},
        }


def cells(row: Row, result: Mapping[str, Any] | None) -> tuple[str, str, str, str, str]:
    """(row, verdict, worst error, allowed, where) as text."""
    if result is None:
        return row.name, "FAIL", "", "", "missing: it has no result"
    if result.get("reason"):
        return row.name, "FAIL", "", "", result["reason"]
    worst = headline(result["checks"])
    error = worst["error"] if worst["error"] is not None else float("inf")
    where = worst["kind"] if worst["where"] == worst["kind"] else f"{worst['kind']}: "
    where += "" if worst["where"] == worst["kind"] else worst["where"]
    verdict = "PASS" if result["passed"] else "FAIL"
    return row.name, verdict, f"{error:.1e}", f"{worst['allowed']:.0e}", where


def headline(checks: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The check to show: the worst, where a fall of the loss counts only if it did not happen."""
    first = checks[0]
    if first["kind"] != "loss falls":
        return first
    falls_well = first["error"] is not None and first["error"] <= first["allowed"]
    return checks[1] if falls_well and len(checks) > 1 else first


def line(row: Row, result: Mapping[str, Any]) -> str:
    """One row as it finishes."""
    name, verdict, error, allowed, where = cells(row, result)
    figures = f"{error} of {allowed} in " if error else ""
    return f"{verdict}  {name}  {figures}{where}  ({result.get('seconds', 0.0):.1f} s)"


def table(rows: Iterable[Row], results: Results) -> Any:
    """The final table, for rich."""
    from rich.table import Table

    made = Table(title="Parity with one process", title_style="bold")
    for name in ("row", "", "worst error", "allowed", "in"):
        made.add_column(name, overflow="fold", no_wrap=name in ("", "allowed"))
    for row in rows:
        name, verdict, *rest = cells(row, results.get(row.name))
        colour = "green" if verdict == "PASS" else "bold red"
        made.add_row(name, f"[{colour}]{verdict}[/]", *rest)
    return made
