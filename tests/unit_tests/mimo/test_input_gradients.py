# SPDX-License-Identifier: Apache-2.0
"""Column-parallel layers sum the gradient of their input over TP where it is wanted, each time."""

from __future__ import annotations

import torch
from torch import nn

from megatron.core.models.mimo.transformer.input_gradients import sum_wanted_gradients_only
from megatron.core.tensor_parallel import ColumnParallelLinear


class Column(ColumnParallelLinear):
    """As much of the layer as is looked at; notes whether it would sum."""

    def __init__(self, allreduce_dgrad: bool) -> None:
        nn.Module.__init__(self)
        self.allreduce_dgrad = allreduce_dgrad
        self.sums: list[bool] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.sums.append(self.allreduce_dgrad)
        return x


def test_a_pass_without_gradients_does_not_end_the_sums_of_later_ones() -> None:
    """An evaluation between two steps, or an encoder that is unfrozen."""
    summing, scattering = Column(True), Column(False)
    sum_wanted_gradients_only(nn.ModuleList([summing, scattering]))
    for wanted in (True, False, True):
        for layer in (summing, scattering):
            layer(torch.ones(2, requires_grad=wanted))
    assert summing.sums == [True, False, True]
    assert scattering.sums == [False] * 3
