# SPDX-License-Identifier: Apache-2.0
"""A cell is run: the classifier on the ranks of a launch, the easy-VQA model by its own command."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from campaigns.launches import Tell
from megatron.core.models.mimo.lossy.loss_models import Bernoulli, LossModel, from_loss_and_burst
from megatron.core.models.mimo.lossy.reports import LinkSpeed, step_time
from megatron.core.models.mimo.lossy.spec import LinkRule, LossySpec
from megatron.core.models.mimo.lossy.statistics import sum_counts
from studies.lossy import easy_vqa
from studies.lossy.grid import GRADIENTS, NOWHERE, STEPS, WORLD, Cell

SPEED = LinkSpeed(bits_per_second=10e9, round_trip_s=50e-6, header_bytes=50)


def work(tell: Tell, keys: list[str], plan: dict[str, Any]) -> None:
    """Train the classifier in cells, one after the other; all ranks together.

    Args:
        tell: of each result.
        keys: of the cells.
        plan: key -> fields of the cell.
    """
    # Here: the command lists and shows cells without PyTorch's threads.
    from studies.lossy.classifier import train
    from tests.harness.garbage import end_threads_of_groups

    for key in keys:
        tell.started(key)
        cell, began = Cell(**plan[key]), time.monotonic()
        found = train(cell.tp, spec_of(cell), cell.steps, STEPS[cell.subject][1], cell.seed)
        rows = found.rows
        tell.finished(
            key,
            {
                "passed": True,
                "accuracy": found.accuracy,
                "accuracy_lossy": found.accuracy_lossy,
                "held_out_loss": found.held_out_loss,
                "curve": found.curve,
                "losses": found.losses,
                "counts": sum_counts(rows, ())[0] if rows else None,
                "step_time": step_time(rows, cell.steps, SPEED) if rows else None,
                "seconds": round(time.monotonic() - began, 1),
            },
        )
        end_threads_of_groups()


def run_easy_vqa(cell: Cell, out: Path) -> dict[str, Any]:
    """Return the result of a cell of the easy-VQA model; its ranks are the command's own.

    Raises:
        RuntimeError: the command failed.
    """
    began = time.monotonic()
    found = easy_vqa.train(
        easy_vqa.changes(cell.tp, WORLD, cell.steps, cell.seed, recipe_links(cell), out), out
    )
    counted = found.get("lossy")
    return {
        "passed": True,
        "accuracy": found["exact_match"],
        "accuracy_lossy": None,
        "held_out_loss": found["held_out_loss"],
        "curve": {},
        "losses": found["losses"],
        "counts": sum_counts(counted["counts"], ())[0] if counted else None,
        "step_time": counted["step_time"] if counted else None,
        "seconds": round(time.monotonic() - began, 1),
    }


def spec_of(cell: Cell) -> LossySpec | None:
    """Return the spec of a cell's links; None: there are none."""
    if cell.where == NOWHERE:
        return None
    if cell.where == GRADIENTS:
        where: dict[str, Any] = {"layers": "gradients.*", "collectives": ("gradients",)}
    else:
        where = {"layers": "*", "directions": (cell.where,)}
    rule = LinkRule(loss=model_of(cell), replacement=cell.replacement, **where)
    return LossySpec((rule,), cell.seed)


def model_of(cell: Cell) -> LossModel:
    """Return when a cell's packets are lost: a burst of 1 is Bernoulli's."""
    if cell.burst == 1:
        return Bernoulli(cell.rate)
    return from_loss_and_burst(cell.rate, cell.burst)


def recipe_links(cell: Cell) -> dict[str, Any] | None:
    """Return the same as fields of a recipe."""
    spec = spec_of(cell)
    if spec is None:
        return None
    (rule,) = spec.rules
    return {"seed": spec.seed, "rules": [asdict(rule)]}
