# SPDX-License-Identifier: Apache-2.0
"""Microbatches of the digits model on a watched device, for tests of where the host waits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from examples.mimo.digits.data import SEQUENCE_LENGTH, DigitsBatches
from megatron.core.models.mimo.job.packing import pack, padded_lengths
from megatron.core.utils import unwrap_model
from mimo_colocated.launch.layouts import Layout
from tests.harness.host_waits import watched_device
from tests.models.trainer import Trainer, TrainOptions
from tests.unit_tests.mimo.test_packed_positions_ranks import built

TEXT = 5
SAMPLES = 8
ENCODER = "encoder launched"


@dataclass(frozen=True)
class Case:
    """A kind of microbatch.

    Attributes:
        positions: of the language model, such as "rope".
        packed: samples of several lengths in one sequence.
        sounds: a second encoder.
        text_only: no images on any rank.
        options: further ones of the model.
    """

    positions: str = "rope"
    packed: bool = False
    sounds: bool = False
    text_only: bool = False
    options: tuple[tuple[str, Any], ...] = ()


CASES = {
    "dense": Case(),
    "packed": Case(packed=True),
    "mrope packed": Case("mrope", packed=True),
    "two encoders": Case(sounds=True),
    "two encoders packed": Case(packed=True, sounds=True),
    "frozen": Case(options=(("freeze", "vision-encoder"),)),
    "frozen packed": Case(packed=True, options=(("freeze", "encoder+projector"),)),
    "text only": Case(text_only=True),
    "text only packed": Case(packed=True, text_only=True),
}


class Watched:
    """A model, its loader and the device that they run on.

    Args:
        trainer: of the model.
        case: what it computes.
        varied: samples differ in length.

    Attributes:
        device: watched by :meth:`run`; encoders that are launched leave a mark among its waits.
    """

    def __init__(self, trainer: Trainer, case: Case, varied: bool = True) -> None:
        self.trainer, self.case = trainer, case
        self.data = DigitsBatches(7, "train", SAMPLES, varied=varied, audio=case.sounds)
        self.device = watched_device()
        self.device.hold(trainer.model)
        trainer.device = self.device.device
        for submodule in trainer.model.modality_submodules.values():
            for encoder in unwrap_model(submodule).encoders.values():
                encoder.register_forward_hook(self._mark)

    def _mark(self, *_: Any) -> None:
        self.device.host_waits.append(ENCODER)

    def inputs(self, number: int, count: int = 1) -> dict[str, Any]:
        """What the model is called with, as the job's own loader makes it."""
        trainer, case = self.trainer, self.case
        batch = trainer.local_batch(self.data, 0, number, count)
        inputs = trainer.inputs(batch)
        if case.positions == "mrope":
            inputs["position_ids"] = self._positions(batch.lengths)
        if case.text_only:
            ids = torch.full(tuple(inputs["input_ids"].shape), TEXT)
            inputs["input_ids"] = self.device.upload(ids)
            inputs["modality_inputs"] = dict.fromkeys(inputs["modality_inputs"])
            nowhere = np.zeros((SAMPLES // count, SEQUENCE_LENGTH), dtype=bool)
            lengths = self.data.lengths(0, number, count) if case.packed else None
            tokens = dict.fromkeys(trainer.plans.bridges, nowhere)
            inputs["route_plan"] = trainer.plans.of(tokens, lengths)
        return inputs

    def _positions(self, lengths: Any) -> torch.Tensor:
        """Three channels, each in another order."""
        counted = torch.arange(SEQUENCE_LENGTH)
        rows = torch.stack([counted, counted.flip(0), counted // 2])
        rows = rows[:, None].expand(-1, len(lengths), -1)
        if self.case.packed:
            padded = padded_lengths(lengths, self.trainer.multiple)
            rows = torch.stack([pack(channel, padded) for channel in rows])
        return self.device.upload(rows)

    def run(self, **changes: Any) -> list[Any]:
        """Load, forward and backward of one microbatch; the waits and marks among them.

        Args:
            changes: to what the model is called with.
        """
        self.device.host_waits.clear()
        with self.device.watch():
            inputs = {**self.inputs(0), **changes}
            losses, mask = self.trainer.model(**inputs)
            (losses * mask).sum().backward()
        return list(self.device.host_waits)


@contextlib.contextmanager
def watched(case: Case, layouts: tuple[str, str], **options: Any) -> Iterator[Watched]:
    """A model in the layouts of encoders and language model; "alone": on each rank by itself."""
    vision, language = layouts
    options |= dict(case.options)
    if layouts == ("alone", "alone"):
        vision = language = "tp=1,dp=1"
        options["rank_offset"] = dist.get_rank()
    if case.sounds:
        options["audio"] = Layout.parse(vision, "audio")
    options |= {"packed": case.packed, "overlap_grad_reduce": True}
    with built(case.positions, vision, language, **options) as made:
        trainer = Trainer(made, TrainOptions(steps=1, global_batch_size=SAMPLES), False)
        yield Watched(trainer, case, varied=options.get("varied_lengths", True))
