# SPDX-License-Identifier: Apache-2.0
"""A model from a Hugging Face folder over the batches of a recipe: steps, held-out loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core.models.mimo.data.loader import Microbatch, RankBatch
from megatron.core.models.mimo.job.packing import packing
from megatron.core.models.mimo.job.trainer import LossFunction, Runner, Trainer
from megatron.core.models.mimo.uploads import upload
from megatron.core.utils import unwrap_model
from mimo_colocated import phases
from mimo_colocated.train.data import StepData


class RecipeRunner(Runner):
    """Runs a model over a recipe's microbatches, and measures held-out loss."""

    measuring = False
    blank = False
    """Every image is blank: nothing of it is seen."""

    def inputs(self, microbatch: Microbatch) -> dict[str, Any]:
        """Return what the model is called with."""
        language, device = microbatch.language, self.device
        found: dict[str, Any] = {
            name: upload(torch.from_numpy(getattr(language, name)), device)
            for name in ("input_ids", "position_ids", "labels", "loss_mask")
        }
        if language.padded is not None:
            found["packing_kwargs"] = packing(language.lengths, language.padded)
        built: Any = self.built
        shown = {
            part.modality: self._shown(part, microbatch.items[part.modality])
            for part in built.composite.encoders
        }
        return {**found, "modality_inputs": shown or None, "route_plan": microbatch.routes or None}

    def _shown(self, part: Any, inputs: Mapping[str, Any] | None) -> Any:
        if inputs is None:
            return None
        submodules: Any = self.model.modality_submodules
        encoder = unwrap_model(submodules[part.modality]).encoders[part.name]
        on_host = getattr(encoder, "reads_on_host", ())
        made = {name: torch.from_numpy(value) for name, value in inputs.items()}
        made = {n: v if n in on_host else upload(v, self.device) for n, v in made.items()}
        if self.blank:
            made = {n: torch.zeros_like(v) if v.is_floating_point() else v for n, v in made.items()}
        return {part.name: made}

    def forward_step(
        self, data_iterator: Iterator[Mapping[str, Any]], model: torch.nn.Module
    ) -> tuple[Tensor, LossFunction]:
        """Call the model with the next microbatch; while measuring, only its loss is kept."""
        output, loss_function = super().forward_step(data_iterator, model)
        if not self.measuring:
            return output, loss_function
        return output, lambda losses, **_how: loss_function(losses)[2]  # type: ignore[return-value]

    @torch.no_grad()
    def held_out_loss(self, batch: RankBatch) -> tuple[float, float]:
        """Return a batch's summed token losses and counted tokens, the same on all ranks."""
        self.model.eval()
        self.measuring = True
        try:
            inputs = (self.inputs(each) for each in batch.microbatches)
            outputs = self.schedule(inputs, len(batch.microbatches), forward_only=True)
        finally:
            self.measuring = False
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        if outputs:
            sums = torch.stack(outputs).sum(dim=0)
        dist.all_reduce(sums, group=self.groups.dp_cp)
        loss, tokens = self.from_last_stage(sums).tolist()
        return loss, tokens


class RecipeTrainer(RecipeRunner, Trainer):
    """Steps over :class:`StepData`."""

    def gradients(self, data: StepData, step: int) -> tuple[float, int]:
        """Run forward and backward; ``data.waited_s`` becomes the longest wait of a rank."""
        self._data = data
        return super().gradients(data, step)

    def summed(self, sums: Tensor) -> list[float]:
        """Return a step's loss and counted tokens; the longest wait for its data comes along.

        The others wait for it in their collectives. One reduction serves all of it: TP ranks, which
        have the same loss, give a part each, and every rank its waiting in a place of its own.
        """
        numbers = torch.zeros(2 + dist.get_world_size(), dtype=torch.float64, device=self.device)
        numbers[:2] = sums / self.groups.tp.size()
        numbers[2 + dist.get_rank()] = self._data.waited_s
        dist.all_reduce(numbers)
        loss, tokens, *waited = numbers.tolist()
        self._data.waited_s = max(waited)
        return [loss, tokens]

    def microbatches(self, data: StepData, step: int) -> Iterator[Mapping[str, Any]]:
        """Yield what the model is called with in each of a step's microbatches."""
        for microbatch in data.at(step).microbatches:
            with phases.during(phases.DATA):
                made = self.inputs(microbatch)
            yield made
