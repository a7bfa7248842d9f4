# SPDX-License-Identifier: Apache-2.0
"""What fills a stack of layers of which some do not train; one process."""

from __future__ import annotations

import pytest
import torch

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.models.mimo.checkpoint.frozen_state import Frozen, whole_stacks
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory

PREFIX = "mimo.images.optimizer.state"


@pytest.mark.parametrize("kind", ["param", "fp32_param", "exp_avg"])
def test_the_part_of_a_frozen_layer_has_the_dtype_of_the_others(kind: str) -> None:
    weight = torch.nn.Parameter(torch.arange(1, 4, dtype=torch.bfloat16), requires_grad=False)
    state = {"w": ShardedTensor.from_rank_offsets("w", weight)}
    frozen = Frozen(frozenset(), {"w": ((PREFIX, kind, torch.float32),)})
    (made,) = whole_stacks(frozen, state).values()
    assert (made.key, made.dtype, made.data.dtype) == (f"{PREFIX}.{kind}.w", *[torch.float32] * 2)
    assert torch.equal(made.data, torch.zeros(3) if kind == "exp_avg" else weight.float())


@pytest.mark.parametrize("kind", ["fp32_param", "exp_avg_sq"])
def test_both_halves_of_a_gated_layer_are_filled(kind: str) -> None:
    """A gated layer's weight is one tensor here and two in the checkpoint."""
    weight = torch.nn.Parameter(torch.arange(8, dtype=torch.bfloat16).view(4, 2), False)
    gated = apply_swiglu_sharded_factory(ShardedTensor.from_rank_offsets("w", weight), ())
    frozen = Frozen(frozenset(), {"w": ((PREFIX, kind, torch.float32),)})
    (made,) = whole_stacks(frozen, {"w": gated}).values()
    parts = list(nested_values(made.build()))
    assert {part.key for part in parts} == {f"{PREFIX}.{kind}.w"}
    assert {(part.dtype, part.data.dtype) for part in parts} == {(torch.float32, torch.float32)}
    expected = weight.float() if kind == "fp32_param" else torch.zeros(4, 2)
    assert torch.equal(torch.cat([part.data for part in parts]), expected)
