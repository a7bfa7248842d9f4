# SPDX-License-Identifier: Apache-2.0
"""Qwen2.5-VL and Qwen3-VL on 8 ranks, against transformers in one process."""

from __future__ import annotations

from pathlib import Path

import pytest

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
    built, found = harness.compared(
        qwen.task(qwen.MODELS[name]()), LAYOUTS[layout], shared_tmp_path
    )
    differing = harness.changed_by_a_round_trip(built, shared_tmp_path)
    copies = harness.saved_as_copies(built)
    built.destroy()
    assert differing == []
    assert copies == []
    assert found.logits <= harness.LOGITS
    assert found.gradient <= harness.GRADIENTS, found.tensor
