# SPDX-License-Identifier: Apache-2.0
"""Language models of every family on 8 ranks, against transformers in one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from mimo_colocated.launch.layouts import Layout
from tests.unit_tests.mimo.huggingface import harness, models

pytestmark = pytest.mark.ranks(8)

SP = {"sequence_parallel": True}
LAYOUTS = {
    "tp2-cp2-dp2-sp": harness.Case(Layout(tp=2, cp=2, dp=2), settings=SP),
    "pp2-cp2-dp2": harness.Case(Layout(pp=2, cp=2, dp=2)),
    "tp4-dp2": harness.Case(Layout(tp=4, dp=2)),
    "packed": harness.Case(Layout(tp=2, cp=2, dp=2), settings={**SP, "packed": True}),
}
EXPERT_LAYOUTS = {
    "tp2-cp2-dp2-ep2": harness.Case(Layout(tp=2, cp=2, dp=2, ep=2, etp=2), settings=SP),
    "cp2-dp4-ep4": harness.Case(Layout(cp=2, dp=4, ep=4, etp=1)),
    "pp2-dp4-ep2": harness.Case(Layout(pp=2, dp=4, ep=2, etp=2)),
}
# Every family in the layout that cuts most; one family in every layout. `make models` runs all.
ROWS = [
    *(("llama3", layout) for layout in LAYOUTS),
    ("llama-biased", "tp4-dp2"),
    ("mistral", "tp2-cp2-dp2-sp"),
    ("qwen2", "packed"),
    ("qwen2-tied", "pp2-cp2-dp2"),
    ("qwen3", "tp4-dp2"),
    ("qwen3", "tp2-cp2-dp2-sp"),
    ("gpt2", "packed"),
    ("gpt2", "pp2-cp2-dp2"),
    ("qwen3_moe", "tp2-cp2-dp2-ep2"),
    ("qwen3_moe-normalised", "pp2-dp4-ep2"),
    ("mixtral", "cp2-dp4-ep4"),
]


@pytest.mark.parametrize(("family", "layout"), ROWS)
def test_logits_and_gradients_are_those_of_transformers(
    family: str, layout: str, shared_tmp_path: Path
) -> None:
    case = {**LAYOUTS, **EXPERT_LAYOUTS}[layout]
    made = {**models.DENSE, **models.SPARSE}[family]()
    task = harness.text_task(harness.randomise(made, seed=1), models.VOCABULARY)
    built, found = harness.compared(task, case, shared_tmp_path)
    built.destroy()
    assert found.logits <= harness.LOGITS
    assert found.gradient <= harness.GRADIENTS, found.tensor
