# SPDX-License-Identifier: Apache-2.0
"""A tower of transformers at any TP, as an encoder of a modality."""

from __future__ import annotations

from typing import Any

from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.models.mimo.torch_native.parallelize import parallelize
from megatron.core.models.mimo.torch_native.part import TorchNativePart
from megatron.core.models.mimo.torch_native.plans import Plan
from megatron.core.models.mimo.towers.hugging_face import HuggingFaceEncoder


class TorchNativeEncoder(TorchNativePart, HuggingFaceEncoder):
    """:class:`.HuggingFaceEncoder` whose tower is split over the TP ranks of a grid.

    Data ranks hold it whole, and their gradients are summed when a step ends: a rank without
    inputs owes its peers nothing in between.

    Args:
        *args: as of :class:`.HuggingFaceEncoder`.
        grid: of the modality.
        plan: how the tower is split; None takes its family's.
        sequence_parallel: norms and residuals on 1/tp of the rows.
        gradient_checkpointing: as of :class:`.HuggingFaceEncoder`.
        **kwargs: as of :class:`.HuggingFaceEncoder`.
    """

    def __init__(
        self,
        *args: Any,
        grid: HyperCommGrid,
        plan: Plan | None = None,
        sequence_parallel: bool = True,
        gradient_checkpointing: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, gradient_checkpointing=False, **kwargs)
        self._grid = (grid, plan)
        self._settings = {
            "sequence_parallel": sequence_parallel,
            "activation_checkpointing": gradient_checkpointing,
        }

    def shard(self) -> None:
        """Split the tower; see :meth:`.TorchNativePart.shard`."""
        grid, plan = self._grid
        parallelize(self.tower, grid, plan=plan, fsdp=False, **self._settings)
