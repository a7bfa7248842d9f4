# SPDX-License-Identifier: Apache-2.0
"""What the ranks of one launch do: references or rows, one after the other."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from campaigns.launches import Tell
from tests.harness.garbage import end_threads_of_groups
from tests.parity.compare import (
    Measurement,
    Tolerances,
    compare,
    missing,
    names,
    tolerances,
    worst_by_kind,
)
from tests.parity.measure import measure, one_process
from tests.parity.rows import NIGHTLY_ROWS, Reference, Row

Plan = dict[str, Any]


def work(tell: Tell, items: list[str], plan: Plan) -> None:
    """All items, on this rank; the result of each is the same on all ranks."""
    rows = {row.name: row for row in NIGHTLY_ROWS}
    wanted = (row.reference(plan["MICRO_BATCHES"]) for row in NIGHTLY_ROWS)
    references = {reference.name: reference for reference in wanted}
    for item in items:
        started = time.perf_counter()
        tell.started(item)
        if item in rows:
            result = _row(rows[item], plan)
        else:
            result = _reference(references[item], plan)
        seconds = round(time.perf_counter() - started, 2)
        tell.finished(item, {**result, "seconds": seconds, "backend": plan["backend"]})
        end_threads_of_groups()


def _path(reference: Reference, plan: Plan) -> Path:
    return Path(plan["references"]) / f"{reference.name}.pt"


def _reference(reference: Reference, plan: Plan) -> dict[str, Any]:
    steps, micro_batches = plan["TRAIN_STEPS"], plan["MICRO_BATCHES"]
    measured = measure(one_process(reference), reference, micro_batches, steps)
    path = _path(reference, plan)
    temporary = path.with_suffix(".tmp")
    torch.save(vars(measured), temporary)
    temporary.replace(path)
    return {"passed": None, "loss": measured.loss, "curve": measured.curve}


def _row(row: Row, plan: Plan) -> dict[str, Any]:
    reference = row.reference(plan["MICRO_BATCHES"])
    kept = torch.load(_path(reference, plan), map_location="cpu", weights_only=True)
    run = measure(row, reference, plan["MICRO_BATCHES"], plan["TRAIN_STEPS"])
    return agree(run, Measurement(**kept), tolerances(row.dtype, plan["THRESH"]))


def agree(run: Measurement, expected: Measurement, bounds: Tolerances) -> dict[str, Any]:
    """Compare on every rank and let all ranks know the worst of each kind."""
    mine = worst_by_kind(compare(run, expected, bounds))
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (mine, names(run), run.logits is not None))
    checks = [check for found, _, _ in everyone for check in found]
    checks += missing(set().union(*(found for _, found, _ in everyone)), expected)
    assert any(has_logits for _, _, has_logits in everyone)
    worst = worst_by_kind(checks)
    return {
        "passed": all(check.passed for check in checks),
        "worst": worst[0].as_dict(),
        "checks": [check.as_dict() for check in worst],
        "curve": run.curve,
    }
