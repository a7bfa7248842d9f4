# SPDX-License-Identifier: Apache-2.0
"""What a rank of a launch does: train, save, and continue what others saved."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from campaigns.launches import Tell
from megatron.core.models.mimo.checkpoint.store import CheckpointError
from tests.reshape.plan import SAVED_STEPS, Task
from tests.reshape.runs import run_at
from tests.unit_tests.mimo.digits_runs import Run


def work(tell: Tell, keys: list[str], plan: dict[str, Any]) -> None:
    """Do the tasks in turn, those of a place together.

    Args:
        tell: of each result.
        keys: of the tasks, of this world size.
        plan: the tasks by key, and the folder of checkpoints.
    """
    tasks = [Task.from_dict(plan["tasks"][key]) for key in keys]
    for place, group in itertools.groupby(tasks, key=lambda task: task.place):
        tasks_here = list(group)
        # Another seed than the saved run's: weights that are not loaded show.
        seed = 5 if tasks_here[0].source is None else 6
        with run_at(place, seed) as fresh:
            for task in tasks_here:
                tell.started(task.key)
                tell.finished(task.key, _do(Path(plan["checkpoints"]), task, fresh))


def _do(root: Path, task: Task, one: Run) -> dict[str, Any]:
    if task.source is None:
        step = SAVED_STEPS
        one.train(0, step)
        one.save(one.store(root / task.save), step)
        return {"passed": None, "losses": one.train(step, step + task.steps)}
    store = one.store(root / task.source)
    try:
        step = store.steps()[-1]
        one.load(store, step)
    except CheckpointError as error:  # the same on all ranks: the next task can go on
        return {"passed": False, "reason": str(error)}
    losses = one.train(step, step + task.steps)
    if task.save is not None:
        one.save(one.store(root / task.save), step + task.steps)
    return {"passed": None, "losses": losses}
