# SPDX-License-Identifier: Apache-2.0
"""Qwen2.5-VL and Qwen3-VL on 8 ranks, against transformers in one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron.core.models.mimo.huggingface.export import to_folder
from mimo_colocated.launch.layouts import Layout
from tests.unit_tests.mimo.huggingface import harness
from tests.unit_tests.mimo.huggingface import qwen_vl_models as qwen

pytestmark = pytest.mark.ranks(8)

SP = {"sequence_parallel": True}
FAN_IN = {"images": Layout(tp=2, dp=4)}, Layout(tp=2, cp=2, dp=2)
LAYOUTS = {
    "fan-in-sp": harness.Case(FAN_IN[1], FAN_IN[0], SP),
    "fan-out": harness.Case(Layout(cp=2, dp=4), {"images": Layout(tp=4, dp=2)}),
    "equal-pp2-cp2": harness.Case(Layout(pp=2, cp=2, dp=2), {"images": Layout(tp=4, dp=2)}, SP),
    "packed": harness.Case(FAN_IN[1], FAN_IN[0], {**SP, "packed": True}),
}
# Over two stages the third level is added on the second one, of layers that are recomputed too.
RECOMPUTED = harness.Case(
    Layout(tp=2, pp=2, cp=2), {"images": Layout(tp=4, dp=2)}, {**SP, "recompute": "full"}
)
ROWS = [("qwen2_5_vl", layout) for layout in LAYOUTS]
LAYOUTS["pp2-cp2-sp-recomputed"] = RECOMPUTED
ROWS += [("qwen3_vl", layout) for layout in LAYOUTS]


@pytest.mark.parametrize(("name", "layout"), ROWS)
def test_logits_and_gradients_are_those_of_transformers(
    name: str, layout: str, shared_tmp_path: Path
) -> None:
    task, expected = qwen.task(qwen.MODELS[name]()), None
    if dist.get_rank() == 0:
        task.model.save_pretrained(shared_tmp_path / "model")
        expected = harness.oracle(task, shared_tmp_path / "gradients")
    dist.barrier()
    built = harness.built_case(shared_tmp_path / "model", LAYOUTS[layout])
    trainer = harness.trainer_of(built, task)
    logits = harness.logits_of(trainer, task)
    trainer.model.train()
    trainer.gradients(task, 0)
    gradients, found = harness.gradients_of(built), None
    if expected is not None:
        errors = harness.gradient_errors(gradients, expected.gradients)
        found = harness.logits_error(logits, expected, task), harness.worst(errors)
    logits_error, (tensor, gradient_error) = harness.agreed(found)
    to_folder(built, shared_tmp_path / "out")
    differing, copies = None, harness.saved_as_copies(built)
    if expected is not None:
        before, after = (harness.whole_folder(shared_tmp_path / name) for name in ("model", "out"))
        assert before.keys() == after.keys()
        differing = [name for name in before if not torch.equal(before[name], after[name])]
    differing = harness.agreed(differing)
    built.destroy()
    assert differing == []
    assert copies == []
    assert logits_error <= harness.LOGITS
    assert gradient_error <= harness.GRADIENTS, tensor
