# SPDX-License-Identifier: Apache-2.0
"""What the cells of a study say together: means over seeds, intervals, a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from studies.lossy.grid import NOWHERE, RESENT, Cell

Result = Mapping[str, Any]
# Of Student's distribution, two-sided 95 %, by degrees of freedom.
_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
# Of what the lossless runs of the same model reach: what "steps to target" counts to.
TARGET = 0.9


@dataclass(frozen=True)
class Interval:
    """A mean over seeds, and half the width of its 95 % interval; None of one seed."""

    mean: float
    half: float | None

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + ("" if self.half is None else f" ± {self.half:.3f}")


def interval(values: Sequence[float]) -> Interval:
    """Return the interval of independent values by Student's distribution."""
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return Interval(mean, None)
    variance = sum((each - mean) ** 2 for each in values) / (n - 1)
    return Interval(mean, _T[n - 1] * math.sqrt(variance / n))


@dataclass(frozen=True)
class Setting:
    """All runs of a setting.

    Attributes:
        cell: of the first seed.
        seeds: how many ran.
        accuracy: on what is held out, evaluated without loss.
        change: of the accuracy from the lossless run of the same seed: differences by seed.
        accuracy_lossy: evaluated over the links of the training; None where it was not asked.
        loss: held-out.
        to_target: steps until the accuracy was 90 % of the lossless runs' mean at their end, by
            seed; None where it never was.
        curve: mean training loss of each step.
        lost: share of packets.
        step_s: seconds that communication adds to a step at the stated speed; None without links.
    """

    cell: Cell
    seeds: int
    accuracy: Interval
    change: Interval | None
    accuracy_lossy: Interval | None
    loss: Interval
    to_target: list[int | None]
    curve: list[float]
    lost: float | None
    step_s: dict[str, float] | None


def settings(results: Mapping[Cell, Result]) -> list[Setting]:
    """Return the settings in the order of their first cells, of the cells that have a result."""
    by: dict[tuple[Any, ...], dict[int, Result]] = {}
    first: dict[tuple[Any, ...], Cell] = {}
    for cell, result in results.items():
        if "accuracy" in result:
            by.setdefault(cell.setting, {})[cell.seed] = result
            first.setdefault(cell.setting, cell)
    lossless = {
        (cell.subject, cell.tp, cell.steps): by[key]
        for key, cell in first.items()
        if cell.where == NOWHERE
    }
    return [
        _setting(cell, by[key], lossless.get((cell.subject, cell.tp, cell.steps), {}))
        for key, cell in first.items()
    ]


def _setting(cell: Cell, runs: Mapping[int, Result], lossless: Mapping[int, Result]) -> Setting:
    both = [seed for seed in runs if seed in lossless]
    ends = [lossless[seed]["accuracy"] for seed in lossless]
    target = TARGET * sum(ends) / len(ends) if ends else math.inf
    lossy = [run["accuracy_lossy"] for run in runs.values()]
    counts = [run["counts"] for run in runs.values() if run["counts"]]
    times = [run["step_time"] for run in runs.values() if run["step_time"]]
    changes = [runs[seed]["accuracy"] - lossless[seed]["accuracy"] for seed in both]
    curves = zip(*(run["losses"] for run in runs.values()), strict=True)
    return Setting(
        cell=cell,
        seeds=len(runs),
        accuracy=interval([run["accuracy"] for run in runs.values()]),
        change=interval(changes) if changes and cell.where != NOWHERE else None,
        accuracy_lossy=None if None in lossy else interval(lossy),
        loss=interval([run["held_out_loss"] for run in runs.values()]),
        to_target=[_first(run["curve"], target) for run in runs.values()],
        curve=[sum(each) / len(each) for each in curves],
        lost=sum(c["lost"] for c in counts) / sum(c["packets"] for c in counts) if counts else None,
        step_s=times[0] if times else None,
    )


def _first(curve: Mapping[Any, float], target: float) -> int | None:
    reached = sorted(int(step) for step, accuracy in curve.items() if accuracy >= target)
    return reached[0] if reached else None


def same_as_lossless(cell: Cell, results: Mapping[Cell, Result]) -> bool | None:
    """Return whether a run that sends again has the losses of the one that loses nothing.

    None for other runs, and where that one has not run.
    """
    if cell.replacement != RESENT:
        return None
    plain = Cell(cell.subject, cell.tp, NOWHERE, 0.0, 1, "zero", cell.steps, cell.seed)
    beside = results.get(plain)
    return None if beside is None else beside["losses"] == results[cell]["losses"]


COLUMNS = (
    *("model", "TP", "lost in", "rate", "burst", "instead", "seeds", "accuracy"),
    *("change", "evaluated lossy", "held-out loss", "steps to target"),
)


def cells_of(setting: Setting) -> tuple[str, ...]:
    """Return the texts of a setting's row of the table."""
    cell = setting.cell
    where = ("nothing", "", "", "")
    if cell.where != NOWHERE:
        burst = "each by itself" if cell.burst == 1 else str(cell.burst)
        where = (cell.where, f"{cell.rate:.0%}", burst, cell.replacement)
    known = [step for step in setting.to_target if step is not None]
    steps = ", ".join("never" if step is None else str(step) for step in setting.to_target)
    return (
        *(cell.subject, str(cell.tp), *where, str(setting.seeds), str(setting.accuracy)),
        "" if setting.change is None else _signed(setting.change),
        "" if setting.accuracy_lossy is None else str(setting.accuracy_lossy),
        str(setting.loss),
        steps if known else "never",
    )


def _signed(change: Interval) -> str:
    return f"{change.mean:+.3f}" + ("" if change.half is None else f" ± {change.half:.3f}")


def table(found: Sequence[Setting]) -> str:
    """Return the table as Markdown."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(cells_of(each)) + " |" for each in found)])


def times(found: Sequence[Setting]) -> str:
    """Return a table of what communication adds to a step where lost packets are sent again."""
    lines = ["| model | TP | rate | burst | send | send again | wait | in all |", "|---" * 8 + "|"]
    for each in found:
        if each.cell.replacement == RESENT and each.step_s is not None:
            seconds = [f"{1e3 * each.step_s[f'{n}_s']:.3f} ms" for n in ("send", "resend", "wait")]
            cell, total = each.cell, f"{1e3 * each.step_s['total_s']:.3f} ms"
            row = (cell.subject, str(cell.tp), f"{cell.rate:.0%}", str(cell.burst), *seconds, total)
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def as_json(found: Sequence[Setting]) -> list[dict[str, Any]]:
    """Return the settings as plain values, a bare number rounded to six digits."""
    return [_rounded(asdict(each)) for each in found]


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list) else value
