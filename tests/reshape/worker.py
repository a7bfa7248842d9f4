# SPDX-License-Identifier: Apache-2.0
"""What a rank of a launch does: train, save, and continue what others saved."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron.core.models.mimo.training.checkpoint import CheckpointError
from tests.reshape.plan import SAVED_STEPS, Task
from tests.reshape.results import RESULTS
from tests.reshape.runs import run_at
from tests.unit_tests.mimo.digits_runs import Run

CHECKPOINTS = "checkpoints"


def work(out: str, tasks: list[dict[str, Any]]) -> None:
    """Do the tasks in turn; rank 0 adds a line to the results after each.

    Args:
        out: folder of checkpoints and results.
        tasks: of this world size, those of a place together.
    """
    for place, group in itertools.groupby(map(Task.from_dict, tasks), key=lambda t: t.place):
        tasks_here = list(group)
        # Another seed than the saved run's: weights that are not loaded show.
        seed = 5 if tasks_here[0].source is None else 6
        with run_at(place, seed) as fresh:
            for task in tasks_here:
                _record(Path(out), task, _do(Path(out) / CHECKPOINTS, task, fresh))


def _do(root: Path, task: Task, one: Run) -> dict[str, Any]:
    if task.source is None:
        step = SAVED_STEPS
        one.train(0, step)
        one.save(one.store(root / task.save), step)
        return {"losses": one.train(step, step + task.steps)}
    store = one.store(root / task.source)
    try:
        step = store.steps()[-1]
        one.load(store, step)
    except CheckpointError as error:  # the same on all ranks: the next task can go on
        return {"error": str(error)}
    losses = one.train(step, step + task.steps)
    if task.save is not None:
        one.save(one.store(root / task.save), step + task.steps)
    return {"losses": losses}


def _record(out: Path, task: Task, result: dict[str, Any]) -> None:
    if dist.get_rank() == 0:
        with (out / RESULTS).open("a") as file:
            file.write(json.dumps({"key": task.key, **result}) + "\n")
            file.flush()
            os.fsync(file.fileno())
