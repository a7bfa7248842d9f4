# SPDX-License-Identifier: Apache-2.0
"""LLaVA models on 8 ranks, against transformers in one process."""

from __future__ import annotations

from pathlib import Path

import pytest

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
    built, found = harness.compared(llava_task(llava(name)), LLAVA[layout], shared_tmp_path)
    differing = harness.changed_by_a_round_trip(built, shared_tmp_path)
    copies = harness.saved_as_copies(built)
    built.destroy()
    assert differing == []
    assert copies == []
    assert found.logits <= harness.LOGITS
    assert found.gradient <= harness.GRADIENTS, found.tensor
