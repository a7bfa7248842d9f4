# SPDX-License-Identifier: Apache-2.0
"""Sharded models of transformers against the unsharded ones: losses and every whole gradient."""

from __future__ import annotations

import pytest
import torch

from tests.unit_tests.mimo.torch_native.native_cases import (
    BOUND,
    Pair,
    pair,
    side_by_side,
    tokens,
)

pytestmark = pytest.mark.ranks(8, timeout=120)

LAYOUTS = [(1, 1), (1, 2), (1, 4), (2, 2), (4, 2), (2, 4), (8, 1)]  # (fsdp, tp)


def step(both: Pair, length: int) -> None:
    """Losses and gradients of one batch agree."""
    samples = 2 * both.grid.dim_size("dp")
    ids, labels = tokens(samples, length)
    both.zero_grad()
    expected = both.whole(ids, labels=labels).loss
    expected.backward()
    loss = both.sharded(both.own(ids), labels=both.own(labels)).loss
    loss.backward()
    assert type(loss) is torch.Tensor
    assert abs(float(loss) - float(expected)) <= BOUND * abs(float(expected))
    both.check_gradients()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dp, tp", LAYOUTS)
def test_loss_and_every_gradient_are_those_of_the_unsharded_model(dp, tp, tied) -> None:
    with side_by_side(dp, tp) as (grid, _):
        both = pair("qwen2", grid, tie_word_embeddings=tied)
        for length in (13, 24):
            step(both, length)
