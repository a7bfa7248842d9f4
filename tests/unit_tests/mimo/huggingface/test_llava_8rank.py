# SPDX-License-Identifier: Apache-2.0
"""LLaVA models on 8 ranks, against transformers in one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron.core.models.mimo.huggingface.export import to_folder
from tests.imported.plan import LLAVA
from tests.unit_tests.mimo.huggingface import harness
from tests.unit_tests.mimo.huggingface.llava_models import llava, llava_task

pytestmark = pytest.mark.ranks(8)

FAN_IN, PACKED, FAN_OUT, EQUAL, STAGES = list(LLAVA)[1:6]
# make models has all.
ROWS = [("clip-llama", layout) for layout in (FAN_IN, PACKED, FAN_OUT, EQUAL, STAGES)]
ROWS += [("siglip-qwen2", STAGES), ("clip-qwen3", FAN_OUT), ("siglip2-llama", FAN_IN)]


@pytest.mark.parametrize(("name", "layout"), ROWS)
def test_logits_and_gradients_are_those_of_transformers(
    name: str, layout: str, shared_tmp_path: Path
) -> None:
    task, expected = llava_task(llava(name)), None
    if torch.distributed.get_rank() == 0:
        task.model.save_pretrained(shared_tmp_path / "model")
        expected = harness.oracle(task, shared_tmp_path / "gradients")
    torch.distributed.barrier()
    built = harness.built_case(shared_tmp_path / "model", LLAVA[layout])
    trainer = harness.trainer_of(built, task)
    logits = harness.logits_of(trainer, task)
    trainer.model.train()
    trainer.gradients(task, 0)
    gradients = harness.gradients_of(built)
    found = None
    if expected is not None:
        errors = harness.gradient_errors(gradients, expected.gradients)
        found = harness.logits_error(logits, expected, task), harness.worst(errors)
    logits_error, (tensor, gradient_error) = harness.agreed(found)
    to_folder(built, shared_tmp_path / "out")
    differing = None
    if expected is not None:
        before, after = (harness.whole_folder(shared_tmp_path / name) for name in ("model", "out"))
        assert before.keys() == after.keys()
        differing = [name for name in before if not torch.equal(before[name], after[name])]
    differing = harness.agreed(differing)
    copies = harness.saved_as_copies(built)
    built.destroy()
    assert differing == []
    assert copies == []
    assert logits_error <= harness.LOGITS
    assert gradient_error <= harness.GRADIENTS, tensor
