# SPDX-License-Identifier: Apache-2.0
"""What a rank of a launch does: build a model from its folder, compare it with transformers."""

from __future__ import annotations

import tempfile
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
        task, expected = row.task(), None
        if dist.get_rank() == 0:
            task.model.save_pretrained(folder / "model")
            expected = harness.oracle(task, folder / "gradients")
        dist.barrier()
        built = harness.built_case(folder / "model", row.case)
        trainer = harness.trainer_of(built, task)
        logits = harness.logits_of(trainer, task)
        trainer.model.train()
        trainer.gradients(task, 0)
        gradients = harness.gradients_of(built)
        halved, found = row.case.settings.get("dtype") is torch.bfloat16, None
        if expected is not None:
            errors = harness.gradient_errors(gradients, expected.gradients)
            bound = harness.LOGITS
            if halved:
                bound = harness.BF16_TIMES * harness.bf16_error(task, expected)
            error = harness.logits_error(logits, expected, task)
            found = error, bound, harness.worst(errors)
        logits_error, bound, (tensor, gradient_error) = harness.agreed(found)
        built.destroy()
        dist.barrier()
    # Of bf16 the logits are compared; its gradients are those of another rounding at every token.
    passed = logits_error <= bound and (halved or gradient_error <= harness.GRADIENTS)
    found = {"logits": logits_error, "bound": bound, "gradient": gradient_error, "in": tensor}
    return {"passed": passed, **found}
