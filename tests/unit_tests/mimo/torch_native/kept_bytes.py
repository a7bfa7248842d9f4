# SPDX-License-Identifier: Apache-2.0
"""How much of a residual stream a rank keeps for backward, measured at its norms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def kept_by_norms(model: nn.Module, run: Callable[[], Any]) -> int:
    """Return the bytes of activations that this rank's norms in a model keep for backward.

    Args:
        model: whose modules named ``...norm`` are looked at; those of queries and keys, too.
        run: runs a forward pass of it, maybe a backward one.
    """
    total, inside = 0, False

    def keep(tensor: Tensor) -> Tensor:
        nonlocal total
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        total += local.numel() * local.itemsize * (inside and tensor.ndim == 3)
        return tensor

    def switch(value: bool) -> Any:
        def hook(*_: Any) -> None:
            nonlocal inside
            inside = value

        return hook

    handles = []
    for name, module in model.named_modules():
        if name.endswith("norm"):
            handles.append(module.register_forward_pre_hook(switch(True)))
            handles.append(module.register_forward_hook(switch(False)))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    for handle in handles:
        handle.remove()
    assert total > 0
    return total
