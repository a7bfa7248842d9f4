# SPDX-License-Identifier: Apache-2.0
"""Input gradients that nobody wants are not summed over TP.

Megatron-Core's column-parallel layers compute the gradient of their input and sum it over TP
whether or not the input needs one. Above a frozen encoder it does not, and the sum is a
collective for nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from megatron.core.tensor_parallel import ColumnParallelLinear


def sum_wanted_gradients_only(module: nn.Module) -> None:
    """Make the layers of ``module`` look at their input first, at each forward pass.

    Whether it needs a gradient is the same on all TP ranks: they freeze alike. Layers that scatter
    their input over TP (sequence parallelism) stay as they are.
    """
    for layer in module.modules():
        if isinstance(layer, ColumnParallelLinear) and layer.allreduce_dgrad:
            layer.register_forward_pre_hook(_look_at_input)


def _look_at_input(layer: Any, inputs: tuple[Any, ...]) -> None:
    if inputs and torch.is_tensor(inputs[0]):
        layer.allreduce_dgrad = inputs[0].requires_grad
