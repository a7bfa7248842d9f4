# SPDX-License-Identifier: Apache-2.0
"""What fills a stack of layers of which some do not train; one process."""

from __future__ import annotations

import pytest
import torch

from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.models.mimo.checkpoint.frozen_state import Frozen, whole_stacks

PREFIX = "mimo.images.optimizer.state"


@pytest.mark.parametrize("kind", ["param", "fp32_param", "exp_avg"])
def test_the_part_of_a_frozen_layer_has_the_dtype_of_the_others(kind: str) -> None:
    weight = torch.nn.Parameter(torch.arange(1, 4, dtype=torch.bfloat16), requires_grad=False)
    state = {"w": ShardedTensor.from_rank_offsets("w", weight)}
    frozen = Frozen(frozenset(), {"w": ((PREFIX, kind, torch.float32),)})
    (made,) = whole_stacks(frozen, state).values()
    assert (made.key, made.dtype, made.data.dtype) == (f"{PREFIX}.{kind}.w", *[torch.float32] * 2)
    assert torch.equal(made.data, torch.zeros(3) if kind == "exp_avg" else weight.float())
