# SPDX-License-Identifier: Apache-2.0
"""Activation recomputation of modules that train in part."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def recomputable(hidden: torch.Tensor, module: Any) -> torch.Tensor:
    """Return the input of a transformer whose layers may be recomputed.

    A layer that Megatron-Core recomputes as a whole has a backward pass only if its *input* needs
    a gradient. Behind a frozen embedding it does not, and the layer's own weights would get no
    gradient, without an error. There the input is made to need one.

    Args:
        hidden: what the first layer is given.
        module: the transformer, bare or wrapped, with Megatron's ``config``.
    """
    config = getattr(module, "config", None)
    if hidden.requires_grad or getattr(config, "recompute_granularity", None) != "full":
        return hidden
    if not (isinstance(module, nn.Module) and module.training and torch.is_grad_enabled()):
        return hidden
    trains = any(parameter.requires_grad for parameter in module.parameters())
    return hidden.detach().requires_grad_() if trains else hidden


def gradients_come_apart(module: nn.Module) -> bool:
    """Return whether one backward pass may give a weight its gradient in several parts.

    What Megatron-Core recomputes has a backward pass of its own within the backward pass. Attention
    alone has no weights.
    """
    for part in module.modules():
        config: Any = getattr(part, "config", None)
        kind = getattr(config, "recompute_granularity", None)
        if kind == "full":
            return True
        if kind == "selective" and set(config.recompute_modules or ()) - {"core_attn"}:
            return True
    return False
