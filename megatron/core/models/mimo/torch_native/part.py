# SPDX-License-Identifier: Apache-2.0
"""A part of a ``MimoModel`` that PyTorch's own tools shard."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class TorchNativePart:
    """Mixin of modules that are whole until their module is wrapped, and are sharded then.

    Until then weights are drawn or loaded, and frozen, as of any module on one rank.

    Attributes:
        initial_std: of the normal distribution that matrices are drawn from; None leaves that to
            their modules.
        precision: dtype that it computes in beside fp32 weights; None for the weights' own.
    """

    initial_std: float | None = None
    precision: torch.dtype | None = None

    def shard(self) -> None:
        """Shard this part's own weights, in place; all ranks of its grid call it together.

        Raises:
            ValueError: the same on all ranks, before anything is changed: what does not fit.
        """
        raise NotImplementedError


def native_parts(module: nn.Module) -> list[Any]:
    """Return the torch-native parts of a module, in order."""
    return [part for part in module.modules() if isinstance(part, TorchNativePart)]
