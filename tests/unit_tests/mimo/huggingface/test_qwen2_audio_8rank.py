# SPDX-License-Identifier: Apache-2.0
"""Qwen2-Audio on 8 ranks, against transformers in one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.unit_tests.mimo.huggingface import harness, sounds

pytestmark = pytest.mark.ranks(8)


EIGHT = [name for name, case in sounds.CASES.items() if case.language.size == 8]


@pytest.mark.parametrize("name", EIGHT)
def test_logits_and_gradients_are_those_of_transformers(name: str, shared_tmp_path: Path) -> None:
    task, expected = sounds.task(), None
    if torch.distributed.get_rank() == 0:
        task.model.save_pretrained(shared_tmp_path / "model")
        expected = harness.oracle(task, shared_tmp_path / "gradients")
    torch.distributed.barrier()
    built = harness.built_case(shared_tmp_path / "model", sounds.CASES[name])
    trainer = harness.trainer_of(built, task)
    logits = harness.logits_of(trainer, task)
    trainer.model.train()
    trainer.gradients(task, 0)
    gradients = harness.gradients_of(built)
    found = None
    if expected is not None:
        errors = harness.gradient_errors(gradients, expected.gradients)
        found = harness.logits_error(logits, expected, task), harness.worst(errors)
    logits_error, (worst, gradient_error) = harness.agreed(found)
    built.destroy()
    assert logits_error <= harness.LOGITS
    assert gradient_error <= harness.GRADIENTS, worst
