# SPDX-License-Identifier: Apache-2.0
"""Weights of an earlier run, out of its checkpoint, in place of those of a folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.core.models.mimo.checkpoint.store import CheckpointStore
from megatron.core.models.mimo.gradients.finalize import iter_modules
from megatron.core.models.mimo.huggingface.lora import attach, merge_into
from megatron.core.models.mimo.huggingface.weights import Part
from megatron.core.models.mimo.model.base import MimoModel
from megatron.core.models.mimo.training.pretrained import keep_weights
from mimo_colocated.launch.lora import Lora


@dataclass(frozen=True)
class EarlierRun:
    """A checkpoint whose weights a model begins with.

    Attributes:
        root: folder of the checkpoints.
        step: of the one that is read.
        lora: adapters that it has, which are merged into the weights.
    """

    root: Path
    step: int
    lora: Lora | None = None

    def load(self, model: MimoModel, parts: Sequence[Part]) -> None:
        """Load the weights, saved in any layout; all ranks call it together.

        Args:
            model: not wrapped yet if the run has adapters.
            parts: its modules.

        Raises:
            CheckpointError: on all ranks: the checkpoint is of another model, or damaged.
        """
        if self.lora is not None:
            trains = [(weight, weight.requires_grad) for weight in model.parameters()]
            attach(parts, self.lora, seed=0)
        CheckpointStore(self.root, {}).load(self.step, model)
        if self.lora is not None:
            merge_into(parts)
            for weight, was in trains:
                weight.requires_grad_(was)
        for _, module in iter_modules(model):
            keep_weights(module)
