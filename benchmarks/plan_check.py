# SPDX-License-Identifier: Apache-2.0
"""Predicted against published steps: ``python -m benchmarks.plan_check``, ``make plan-check``.

Fits the planner's constants to four published rows and prints, for each row, times and gains as
they are predicted with all rows, and with constants fitted to the three others. ``--held-out FILE``
predicts further rows, a JSON list, with the constants of these four. Exits 1 if the
mean error of time is more than 5 %, if less than three gains are within 6 points, or if the
package's constants are not those of the fit.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.published import ROWS, Row, fit, h100, rows_from
from megatron.core.models.mimo.plan.candidates import VIRTUAL_STAGES
from megatron.core.models.mimo.plan.machine import REACHED, Machine, Reached

MEAN_ERROR, GAIN_POINTS, GAINS = 0.05, 6.0, 3
# The package's constants are those of the fit, rounded.
_ROUNDING = 0.01


@dataclass(frozen=True)
class Compared:
    """A row as predicted.

    Attributes:
        row: as published.
        milliseconds: of the homogeneous and of the colocated step.
        gigabytes: of the fullest rank, without the margin.
    """

    row: Row
    milliseconds: tuple[float, float]
    gigabytes: tuple[float, float]

    @property
    def errors(self) -> tuple[float, float]:
        """Of both times, as parts of the published ones."""
        pairs = zip(self.milliseconds, self.row.milliseconds, strict=True)
        first, second = (ours / theirs - 1 for ours, theirs in pairs)
        return first, second

    @property
    def gain(self) -> float:
        """In percent."""
        return 100 * (self.milliseconds[0] / self.milliseconds[1] - 1)


def compare(row: Row, machine: Machine, virtual: Sequence[int] = VIRTUAL_STAGES) -> Compared:
    """Return a row as predicted.

    Args:
        row: as published.
        machine: with some constants.
        virtual: numbers of stages of a rank to choose from.
    """
    both = row.estimates(machine, virtual)
    first, second = (1000 * each.seconds.passes for each in both)
    low, high = (each.memory.expected / 1e9 for each in both)
    return Compared(row, (first, second), (low, high))


def mean_error(compared: Sequence[Compared]) -> float:
    """Return the mean of absolute errors of all times."""
    errors = [abs(error) for each in compared for error in each.errors]
    return sum(errors) / len(errors)


def gains_within(compared: Sequence[Compared]) -> int:
    """Return how many gains are within :data:`GAIN_POINTS`."""
    return sum(abs(each.gain - each.row.gain) <= GAIN_POINTS for each in compared)


def passes(compared: Sequence[Compared]) -> bool:
    """Return whether times and gains are near enough."""
    return mean_error(compared) <= MEAN_ERROR and gains_within(compared) >= GAINS


def check() -> dict[str, Any]:
    """Fit, compare, leave out; plain values for the table and the JSON."""
    fitted = fit(ROWS)
    all_rows = [compare(row, h100(fitted)) for row in ROWS]
    left_out = [
        compare(row, h100(fit([other for other in ROWS if other is not row]))) for row in ROWS
    ]
    fixed = {
        count: [compare(row, h100(fitted), [count]) for row in ROWS] for count in VIRTUAL_STAGES
    }
    return {
        "constants": asdict(fitted),
        "rows": [_cell(one, other) for one, other in zip(all_rows, left_out, strict=True)],
        "mean_error": mean_error(all_rows),
        "gains_within": gains_within(all_rows),
        "left_out_mean_error": mean_error(left_out),
        "left_out_gains_within": gains_within(left_out),
        "with_virtual_stages": {
            count: {"mean_error": mean_error(each), "gains_within": gains_within(each)}
            for count, each in fixed.items()
        },
        "passed": passes(all_rows) and same_constants(fitted, REACHED),
    }


def same_constants(fitted: Reached, kept: Reached) -> bool:
    """Return whether constants are those of a fit, as far as they are rounded."""
    pairs = zip(asdict(fitted).values(), asdict(kept).values(), strict=True)
    return all(abs(one - other) <= _ROUNDING for one, other in pairs)


def _cell(one: Compared, left_out: Compared) -> dict[str, Any]:
    return {
        "row": str(one.row),
        "published_ms": one.row.milliseconds,
        "predicted_ms": [round(ms) for ms in one.milliseconds],
        "errors": [round(error, 4) for error in one.errors],
        "published_gain": one.row.gain,
        "gain": round(one.gain, 1),
        "left_out_errors": [round(error, 4) for error in left_out.errors],
        "left_out_gain": round(left_out.gain, 1),
        "published_GB": one.row.gigabytes,
        "predicted_GB": [round(size, 1) for size in one.gigabytes],
    }


def table(result: dict[str, Any]) -> str:
    """Return the result in markdown."""
    lines = [
        "| encoder + language, context, vision, GPUs | published ms, homogeneous → colocated "
        "| predicted | error | gain %, published / predicted | left out: error, gain "
        "| GB published | GB predicted |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for cell in result["rows"]:
        percent = [
            " → ".join(f"{100 * error:+.1f} %" for error in cell[name])
            for name in ("errors", "left_out_errors")
        ]
        lines.append(
            f"| {cell['row']} | {_arrow(cell['published_ms'])} | {_arrow(cell['predicted_ms'])} "
            f"| {percent[0]} | {cell['published_gain']} / {cell['gain']} "
            f"| {percent[1]}, {cell['left_out_gain']} "
            f"| {_arrow(cell['published_GB'])} | {_arrow(cell['predicted_GB'])} |"
        )
    constants = ", ".join(f"{name} {value:.3f}" for name, value in result["constants"].items())
    lines += [
        "",
        f"Mean error of time {100 * result['mean_error']:.1f} %, gains within {GAIN_POINTS:g} "
        f"points {result['gains_within']} of {len(ROWS)}; each row left out of its own fit: "
        f"{100 * result['left_out_mean_error']:.1f} %, {result['left_out_gains_within']} of "
        f"{len(ROWS)}.",
        f"Parts of the data sheet that are reached: {constants}.",
    ]
    for count, each in result["with_virtual_stages"].items():
        lines.append(
            f"With {count} virtual stage{'s' * (count > 1)} in the one row that has a pipeline: "
            f"{100 * each['mean_error']:.1f} %, {each['gains_within']} of {len(ROWS)}."
        )
    return "\n".join(lines)


def held_out(rows: Sequence[Row]) -> str:
    """Return rows that nothing was fitted to, as predicted, in markdown."""
    compared = [compare(row, h100(REACHED)) for row in rows]
    lines = ["| held out | published ms | predicted ms | error | gain % |", "|---|---|---|---|---|"]
    for each in compared:
        errors = " → ".join(f"{100 * error:+.1f} %" for error in each.errors)
        times = _arrow([round(ms) for ms in each.milliseconds])
        lines.append(
            f"| {each.row} | {_arrow(each.row.milliseconds)} | {times} | {errors} "
            f"| {each.row.gain} / {each.gain:.1f} |"
        )
    lines += ["", f"Mean error of time {100 * mean_error(compared):.1f} %, gains within "
              f"{GAIN_POINTS:g} points {gains_within(compared)} of {len(compared)}."]  # fmt: skip
    return "\n".join(lines)


def _arrow(values: Sequence[float]) -> str:
    return " → ".join(str(value) for value in values)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 1 if a bound is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan_check", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--json", type=Path, help="file for the numbers")
    parser.add_argument("--held-out", type=Path, metavar="FILE", help="JSON list of further rows")
    options = parser.parse_args(argv)
    further = rows_from(json.loads(options.held_out.read_text())) if options.held_out else ()
    result = check()
    print(table(result))
    if further:
        print("", held_out(further), sep="\n")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print("PASS" if result["passed"] else "FAIL")
    return int(not result["passed"])


if __name__ == "__main__":
    sys.exit(main())
