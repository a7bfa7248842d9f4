# SPDX-License-Identifier: Apache-2.0
"""The pairs of layouts as a campaign: tasks are run, cases are judged from their losses."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from campaigns.command import Campaign, Console, verdict
from campaigns.launches import Launch, launch, run_tasks
from campaigns.record import Result
from tests.reshape.plan import SETS, Case, Task, launches

WORK = "tests.reshape.work:work"
CHECKPOINTS = "checkpoints"
# Two layouts sum the same numbers in another order: 1e-7 of each sum, which Adam's first steps,
# that divide a gradient by its own size, pass on to the weights. The worst of the usual set was
# 2.6e-7; ten times that leaves room for other machines. What is to be found is far larger: one
# tensor's moment lost changes the losses by 1e-3 of themselves, a learning rate of one step earlier
# by 2e-3, other data, all moments or the step count by 1e-2 and more.
TOLERANCE = 3e-6


class Reshape(Campaign):
    """Save at one layout, continue at another, compare the losses with the uninterrupted run's.

    Args:
        start: makes a launch of ranks; tests put their own in.
    """

    module, title = "tests.reshape", "A run saved at … continues at …"
    columns = ("saved", "continued", "optimizer", "worst", "", "why")
    code = (
        *Campaign.code,
        "examples/mimo/digits/*.py",
        "tests/models/*.py",
        "tests/parity/*.py",
        "tests/reshape/*.py",
        "tests/unit_tests/mimo/digits_runs.py",
    )
    folder = Path("runs/reshape")

    def __init__(self, start: Launch = launch) -> None:
        self._start = start

    def add_options(self, add: Callable[..., Any]) -> None:
        """See ``--help``."""
        add("--all", action="store_const", dest="cases", const="all", default="usual",
            help="every pair of layouts")  # fmt: skip
        add("--quick", action="store_const", dest="cases", const="quick", help="what tests run")

    def choose(self, given: argparse.Namespace) -> Sequence[str]:
        """Tasks of all launches; with ``--fresh`` earlier checkpoints go as well."""
        self.name, self._cases = given.cases, {str(case): case for case in SETS[given.cases]()}
        self._launches = [list(tasks) for tasks in launches(self._cases.values())]
        self._tasks = {task.key: task for tasks in self._launches for task in tasks}
        self._decides = {case.key: str(case) for case in self._cases.values()}
        self._out = given.out or self.folder
        if given.fresh:
            shutil.rmtree(self._out, ignore_errors=True)
        self._results: dict[str, Result] = {}
        return list(self._cases if given.list else self._tasks)

    def keeps(self, name: str, result: Result) -> bool:
        """Losses, if what the task saves is there; failed tasks are tried again."""
        task = self._tasks.get(name)
        saved = task and task.save
        kept = not saved or any((self._out / CHECKPOINTS / saved).glob("step_*"))
        if "losses" in result and kept:
            self._results[name] = result
            return True
        return False

    def run(self, left: Sequence[str], console: Console) -> Iterator[tuple[str, Result]]:
        """Launch after launch: those that save before those that continue."""
        for tasks in self._launches:
            todo = [task for task in tasks if task.key in set(left)]
            for task in todo:  # what a killed run left half done
                if task.save is not None:
                    shutil.rmtree(self._out / CHECKPOINTS / task.save, ignore_errors=True)
            yield from self._launch(todo, console) if todo else ()

    def _launch(self, tasks: list[Task], console: Console) -> Iterator[tuple[str, Result]]:
        plan = {
            "checkpoints": str(self._out / CHECKPOINTS),
            "tasks": {task.key: task.as_dict() for task in tasks},
        }
        world = tasks[0].place.world
        for key, result in run_tasks(
            world, list(plan["tasks"]), WORK, plan, self._out / f"ranks-{world}",
            note=console.note, start=self._start,
        ):  # fmt: skip
            self._results[key] = result
            yield key, result

    def cases(
        self, _names: Sequence[str], results: Mapping[str, Result]
    ) -> dict[str, Result | None]:
        """Every case, judged by all of its losses."""
        return {name: judge(case, results) for name, case in self._cases.items()}

    def line(self, name: str, _result: Result) -> str:
        """A case when its last task ends; other tasks say nothing."""
        case = self._decides.get(name)
        judged = judge(self._cases[case], self._results) if case else None
        return "" if judged is None else "  ".join([verdict(judged), case, *figures(judged)])

    def row(self, name: str, result: Result | None) -> tuple[str, ...]:
        """A case's cells."""
        case = self._cases[name]
        worst, reason = figures(result or {})
        return (
            str(case.places[0]),
            " -> ".join(map(str, case.places[1:])),
            "sharded" if case.places[0].distributed else "whole",
            worst,
            verdict(result),
            reason,
        )

    def summary(self) -> dict[str, Any]:
        """Which set it was, and what was allowed."""
        return {"set": self.name, "tolerance": TOLERANCE}


def figures(result: Result) -> tuple[str, str]:
    """(worst difference, reason) as text."""
    worst = result.get("worst")
    shown = "" if worst is None else "equal" if worst == 0 else f"{worst:.1e}"
    return shown, result.get("reason", "")


def judge(case: Case, results: Mapping[str, Result]) -> Result | None:
    """Compare the losses of a case with the uninterrupted run's; ``None``: some are missing."""
    keys = [f"{case.key}.{stop}" for stop in range(1, len(case.places) - 1)]
    keys = [case.places[0].key, *keys, case.key]
    for key in keys:
        if "reason" in results.get(key, {}):
            return {"passed": False, "reason": results[key]["reason"].splitlines()[0]}
    if any(key not in results for key in keys):
        return None
    found = [loss for key in keys[1:] for loss in results[key]["losses"]]
    return compare(found, results[keys[0]]["losses"][: len(found)], exact=case.exact)


def compare(found: list[float], wanted: list[float], *, exact: bool) -> Result:
    """Judge losses of a case against the uninterrupted run's."""
    if len(found) != len(wanted) or not found:
        return {"passed": False, "reason": f"{len(found)} losses, {len(wanted)} to compare with"}
    differences = [abs(a - b) / abs(b) for a, b in zip(found, wanted, strict=True)]
    worst, limit = max(differences), 0.0 if exact else TOLERANCE
    if all(difference <= limit for difference in differences):  # false for nan
        return {"passed": True, "worst": worst, "exact": exact}
    step = next(i for i, difference in enumerate(differences) if not difference <= limit)
    reason = (
        f"loss {step + 1} after the checkpoint is {found[step]:.9g}, uninterrupted it is "
        f"{wanted[step]:.9g}; a relative difference of {differences[step]:.1e}, allowed is "
        f"{limit:.0e}"
    )
    return {"passed": False, "worst": worst, "exact": exact, "reason": reason}
