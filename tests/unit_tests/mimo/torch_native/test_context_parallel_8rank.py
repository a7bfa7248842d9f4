# SPDX-License-Identifier: Apache-2.0
"""Models of transformers whose sequences are cut over CP, against the unsharded ones."""

from __future__ import annotations

import pytest
import torch

from megatron.core.models.mimo.torch_native import clip_grad_norm, context_parallel, full_gradients
from tests.unit_tests.mimo.torch_native.native_cases import BOUND, Pair, grid_of, pair, tokens

pytestmark = pytest.mark.ranks(8)


def step(both: Pair, length: int) -> None:
    ids, labels = tokens(2 * both.grid.dim_size("dp"), length)
    both.zero_grad()
    expected = both.whole(ids, labels=labels).loss
    expected.backward()
    loss = both.sharded(both.own(ids), labels=both.own(labels)).loss
    loss.backward()
    assert abs(float(loss) - float(expected)) <= BOUND * abs(float(expected))
    both.check_gradients()


def test_loss_and_every_gradient_are_those_of_the_unsharded_model() -> None:
    with grid_of(2, 2, cp=2) as grid:
        both = pair("qwen2", grid, tie_word_embeddings=True)
        step(both, 16)
        step(both, 28)
