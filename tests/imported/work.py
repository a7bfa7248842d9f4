# SPDX-License-Identifier: Apache-2.0
"""What a rank of a launch does: build a model from its folder, compare it with transformers."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from campaigns.launches import Tell
from tests.harness.garbage import end_threads_of_groups
from tests.imported.plan import Row, rows
from tests.unit_tests.mimo.huggingface import harness


def work(tell: Tell, keys: list[str], _plan: Any) -> None:
    """Compare rows in turn.

    Args:
        tell: of each result.
        keys: of the rows, of this world size.
    """
    known = {str(row): row for row in rows()}
    for key in keys:
        tell.started(key)
        tell.finished(key, _compare(known[key]))
        # A row's groups end with it: a gloo group's threads wake a hundred times a second.
        end_threads_of_groups()


def _compare(row: Row) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as own:
        folder = Path(harness.agreed(own))
        built, found = harness.compared(row.task(), row.case, folder)
        built.destroy()
        dist.barrier()
    # Of bf16 the logits are compared; its gradients are those of another rounding at every token.
    halved = row.case.settings.get("dtype") is torch.bfloat16
    passed = found.logits <= found.bound and (halved or found.gradient <= harness.GRADIENTS)
    return {"passed": passed, **asdict(found)}
