# SPDX-License-Identifier: Apache-2.0
"""Pipeline stages tell one another lengths only where a recipe's microbatches have several."""

from __future__ import annotations

import pytest
import transformers

from megatron.core.models.mimo.huggingface import build
from megatron.core.models.mimo.huggingface.build import BuildOptions
from megatron.core.models.mimo.huggingface.composites import describe
from mimo_colocated.launch.layouts import Layout


@pytest.mark.parametrize(
    ("stages", "differ", "told"),
    [(2, True, True), (2, False, False), (1, True, False)],
)
def test_stages_tell_lengths_where_they_differ(stages: int, differ: bool, told: bool) -> None:
    composite = describe(transformers.Qwen2Config(num_hidden_layers=2, hidden_size=64))
    options = BuildOptions(lengths_differ=differ)
    config = build._language_config(composite, Layout(pp=stages), options)
    assert config.variable_seq_lengths is told
