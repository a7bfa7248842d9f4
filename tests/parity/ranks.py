# SPDX-License-Identifier: Apache-2.0
"""What the ranks of one launch do. Run as ``ranks.py FOLDER``, where the plan lies.

The digits job's launcher starts the ranks, ends them together and says which one failed and why.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

# The modules of this script's own folder are the package's, not top-level ones.
sys.path[0] = str(Path(__file__).resolve().parents[2])

from tests.harness.garbage import end_threads_of_groups  # noqa: E402
from tests.harness.launch_plan import LaunchOptions, plan_reader  # noqa: E402
from tests.parity.records import Plan, ProgressWriter  # noqa: E402
from tests.parity.rows import NIGHTLY_ROWS, Reference, Row  # noqa: E402


def job(options: LaunchOptions, backend: str) -> None:
    """All items of the plan, on this rank."""
    import torch.distributed as dist
    from launch import init_distributed

    init_distributed(backend, options.plan.timeout)
    writer = ProgressWriter(options.out / "progress.jsonl")
    leads = dist.get_rank() == 0
    for item in options.plan.items:
        started = time.perf_counter()
        if leads:
            writer.started(item)
        result = run_item(item, options.plan)
        result |= {"seconds": round(time.perf_counter() - started, 2), "backend": backend}
        if leads:
            writer.finished(item, result)
        end_threads_of_groups()
    dist.barrier()


def run_item(item: str, plan: Plan) -> dict[str, Any]:
    """The result of one row, or of one reference: the same on all ranks."""
    known = {row.name: row for row in NIGHTLY_ROWS}
    if item in known:
        return _run_row(known[item], plan)
    references = {row.reference(plan.micro_batches) for row in NIGHTLY_ROWS}
    return _run_reference(next(r for r in references if r.name == item), plan)


def reference_path(folder: str | Path, reference: Reference) -> Path:
    """Where a reference's measurement is kept."""
    return Path(folder) / f"{reference.name}.pt"


def _run_reference(reference: Reference, plan: Plan) -> dict[str, Any]:
    import torch

    from tests.parity.measure import measure, one_process

    measured = measure(one_process(reference), reference, plan.micro_batches, plan.steps)
    path = reference_path(plan.references, reference)
    temporary = path.with_suffix(".tmp")
    torch.save(vars(measured), temporary)
    temporary.replace(path)
    return {"loss": measured.loss, "curve": measured.curve}


def _run_row(row: Row, plan: Plan) -> dict[str, Any]:
    import torch

    from tests.parity.compare import Measurement, tolerances
    from tests.parity.measure import measure

    reference = row.reference(plan.micro_batches)
    path = reference_path(plan.references, reference)
    expected = Measurement(**torch.load(path, map_location="cpu", weights_only=True))
    run = measure(row, reference, plan.micro_batches, plan.steps)
    return agree(run, expected, tolerances(row.dtype, plan.thresh))


def agree(run: Any, expected: Any, bounds: Any) -> dict[str, Any]:
    """Compare on every rank and let all ranks know the worst of each kind."""
    import torch.distributed as dist

    from tests.parity.compare import compare, missing, names, worst_by_kind

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


def _end_with_the_runner() -> None:
    """Without the runner nobody reads the results: end the ranks, which the launcher does."""
    runner = os.getppid()

    def watch() -> None:
        while os.getppid() == runner:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True, name="runner-watch").start()


if __name__ == "__main__":
    from launch import run

    if "RANK" not in os.environ:
        _end_with_the_runner()
    sys.exit(run(__file__, sys.argv[1:], plan_reader(Plan), job))
