# SPDX-License-Identifier: Apache-2.0
"""LoRA on 8 ranks against peft on transformers' model in one process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mimo_colocated.launch.layouts import Layout
from tests.unit_tests.mimo.huggingface import harness, llava_models, lora_models, models
from tests.unit_tests.mimo.huggingface.lora_models import LORA
from tests.unit_tests.mimo.huggingface.qwen_vl_models import MODELS as QWEN_VL
from tests.unit_tests.mimo.huggingface.qwen_vl_models import task as qwen_vl_task

pytestmark = pytest.mark.ranks(8)

SP = {"sequence_parallel": True}
TEXT = harness.Case(Layout(tp=2, cp=2, dp=2), settings=SP)
WIDE = harness.Case(Layout(tp=4, dp=2))
FAN_IN = harness.Case(Layout(tp=2, cp=2, dp=2), {"images": Layout(tp=2, dp=4)}, SP)
EQUAL = harness.Case(Layout(tp=2, dp=4), {"images": Layout(tp=2, dp=4)})
TOWER = ["out_proj", "fc1", "fc2", "linear_1", "linear_2"]
# What is joined in one layer here, all of it or a part; cut and whole sequences; both modules.
ROWS = {
    "qwen2": (models.DENSE["qwen2"], TEXT, LORA, 2 * 7),
    "qwen2-recomputed": (
        models.DENSE["qwen2"],
        replace(TEXT, settings={**SP, "recompute": "full"}),
        replace(LORA, targets=["v_proj", "up_proj"]),
        2 * 2,
    ),
    "llama3": (models.DENSE["llama3"], WIDE, replace(LORA, targets=["*.1.*_proj"]), 7),
    # One layer for query, key and value, stored as (in, out).
    "gpt2": (models.DENSE["gpt2"], WIDE, replace(LORA, targets=["c_attn", "c_proj"]), 2 * 3),
    "clip-llama": (
        "clip-llama",
        FAN_IN,
        replace(LORA, targets=[*LORA.targets, *TOWER]),
        # Of the tower the layers that are used: 3 of 4.
        2 * 7 + 3 * 6 + 2,
    ),
    "siglip-qwen2": ("siglip-qwen2", EQUAL, replace(LORA, targets=["q_proj", "linear_2"]), 2 + 5),
    "qwen-vl": (next(iter(QWEN_VL)), FAN_IN, replace(LORA, targets=["qkv", "o_proj"]), None),
}


@pytest.mark.parametrize("row", ROWS)
def test_logits_gradients_and_exports_are_those_of_peft(row: str, shared_tmp_path: Path) -> None:
    made, case, lora, adapters = ROWS[row]
    if not isinstance(made, str):
        task = lora_models.text(made())
    elif made in llava_models.MODELS:
        task = llava_models.llava_task(llava_models.llava(made))
    else:
        task = qwen_vl_task(QWEN_VL[made]())
    found = lora_models.compared(task, case, shared_tmp_path, lora)
    assert found["logits"] <= harness.LOGITS
    assert found["gradient"] <= harness.GRADIENTS, found["tensor"]
    assert found["merged"] <= harness.LOGITS
    assert found["control"] > 3 * harness.LOGITS
    assert adapters is None or found["adapters"] == 2 * adapters
