# SPDX-License-Identifier: Apache-2.0
"""A warning where tensor parallelism makes an encoder's ranks compute the same."""

from __future__ import annotations

import warnings
from typing import Any

import torch.distributed as dist
from torch import nn

from megatron.core.models.mimo.torch_native.part import TorchNativePart
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)

_CUT = (ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding)


def warn_of_replicated_encoders(name: str, submodule: Any, grid: Any) -> None:
    """Warn, on the first rank of the grid, if no weight of an encoder is cut over its TP ranks.

    Such an encoder is right at any TP size, and each item is encoded by every TP rank. No
    collective runs.

    Args:
        name: of the modality.
        submodule: its modules.
        grid: its grid; ``None`` without any.
    """
    encoders = getattr(submodule, "encoders", None)
    if grid is None or not isinstance(encoders, nn.ModuleDict):
        return
    sizes = dict(zip(grid.dim_names, grid.shape, strict=False))
    tp, dp = sizes.get("tp", 1), sizes.get("dp", 1)
    if tp == 1:
        return
    rank = dist.get_rank() if dist.is_initialized() else 0
    whole = [key for key, encoder in encoders.items() if _is_whole(encoder)]
    if whole and rank == grid.rank_offset:
        warnings.warn(
            f"All {tp} TP ranks of modality '{name}' compute the same: no weight of its encoders "
            f"{whole} is cut over TP, so every item is encoded {tp} times. tp=1, dp={tp * dp} in "
            "its grid encodes each once; or build the encoder of Megatron's tensor-parallel "
            "layers",
            stacklevel=2,
        )


def _is_whole(encoder: nn.Module) -> bool:
    """Whether an encoder has weights and none of them is cut over TP, now or when it is wrapped."""
    if isinstance(encoder, TorchNativePart):
        return False
    cut = any(getattr(p, "tensor_model_parallel", False) for p in encoder.parameters())
    cut = cut or any(isinstance(module, _CUT) for module in encoder.modules())
    return not cut and next(encoder.parameters(), None) is not None
