# SPDX-License-Identifier: Apache-2.0
"""Steps of the proof models over digits."""

from __future__ import annotations

from examples.mimo.digits.job import DigitsTrainer as Trainer
from megatron.core.models.mimo.job.trainer import StepResult, TrainOptions

__all__ = ["StepResult", "TrainOptions", "Trainer"]
