# SPDX-License-Identifier: Apache-2.0
"""LLaVA models whose towers cut each image over CP, on 8 ranks, against transformers in one.

Images have 9 rows, or 10, and SigLIP2's from 1 to 10: no number of CP ranks divides them all.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron.core.models.mimo.gradients.finalize import iter_modules
from mimo_colocated.launch.layouts import Layout
from tests.imported.plan import SP
from tests.unit_tests.mimo.huggingface import harness
from tests.unit_tests.mimo.huggingface.harness import Case
from tests.unit_tests.mimo.huggingface.llava_models import llava, llava_task

pytestmark = pytest.mark.ranks(8)

IMAGES, LANGUAGE = Layout(tp=2, cp=2, dp=2), Layout(tp=2, cp=2, dp=2)
CASES = {
    "equal-sp": Case(LANGUAGE, {"images": IMAGES}, SP),
    "equal-sp-packed": Case(LANGUAGE, {"images": IMAGES}, {**SP, "packed": True}),
    "stages": Case(Layout(pp=2, cp=2, dp=2), {"images": IMAGES}),
    "cp4-fan-out": Case(Layout(tp=2, dp=4), {"images": Layout(cp=4, dp=2)}),
    "fan-in": Case(
        Layout(tp=2, pp=2, cp=2), {"images": Layout(cp=2, dp=4)}, {"recompute": "full"}
    ),
}
ROWS = [("clip-llama", name) for name in CASES]
ROWS += [("siglip-qwen2", "stages"), ("clip-qwen3", "equal-sp"), ("siglip2-llama", "cp4-fan-out")]


@pytest.mark.parametrize(("name", "case"), ROWS)
def test_logits_and_gradients_are_those_of_transformers(
    name: str, case: str, shared_tmp_path: Path
) -> None:
    built, found = harness.compared(llava_task(llava(name)), CASES[case], shared_tmp_path)
    differing = harness.changed_by_a_round_trip(built, shared_tmp_path)
    copies = harness.saved_as_copies(built)
    sizes = built.layouts()["images"]
    built.destroy()
    assert sizes["cp"] == CASES[case].encoders["images"].cp
    assert (differing, copies) == ([], [])
    assert found.logits <= harness.LOGITS
    assert found.gradient <= harness.GRADIENTS, found.tensor


def test_the_second_cp_rank_has_a_part_of_the_rows(shared_tmp_path: Path) -> None:
    """The control: an error of its copy of the weights alone is seen."""
    task, case = llava_task(llava("clip-llama")), CASES["equal-sp"]
    expected = None
    if dist.get_rank() == 0:
        task.model.save_pretrained(shared_tmp_path / "model")
        expected = harness.oracle(task, shared_tmp_path / "gradients")
    dist.barrier()
    built = harness.built_case(shared_tmp_path / "model", case)
    (tower,) = [module for name, module in iter_modules(built.model) if name == "images"]
    if built.collections["images"].cp.rank() == 1:
        with torch.no_grad():
            tower.module.encoders["vision"].position_embedding[:, 0] += harness.CHANGE
    logits = harness.logits_of(harness.trainer_of(built, task), task)
    built.destroy()
    error = None if expected is None else harness.logits_error(logits, expected, task)
    assert harness.agreed(error) > 10 * harness.LOGITS
