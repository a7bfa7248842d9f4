# SPDX-License-Identifier: Apache-2.0
"""Qwen2-Audio on 8 ranks, against transformers in one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit_tests.mimo.huggingface import harness, sounds

pytestmark = pytest.mark.ranks(8)


EIGHT = [name for name, case in sounds.CASES.items() if case.language.size == 8]


@pytest.mark.parametrize("name", EIGHT)
def test_logits_and_gradients_are_those_of_transformers(name: str, shared_tmp_path: Path) -> None:
    built, found = harness.compared(sounds.task(), sounds.CASES[name], shared_tmp_path)
    built.destroy()
    assert found.logits <= harness.LOGITS
    assert found.gradient <= harness.GRADIENTS, found.tensor
