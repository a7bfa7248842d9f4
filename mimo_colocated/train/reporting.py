# SPDX-License-Identifier: Apache-2.0
"""What rank 0 tells of every step: a line, ``metrics.jsonl``, TensorBoard."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron.core.models.mimo.job.reporter import Reporter
from megatron.core.models.mimo.job.trainer import StepResult, Trainer
from mimo_colocated.train.data import StepData
from mimo_colocated.train.numbers import StepNumbers, said


class RecipeReporter(Reporter):
    """Also tells tokens, images, the work of a step, and how long it waited for its data.

    Args:
        out: folder of the results.
        done: steps that are done already.
        trainer: of the model, for the gradient norms of its modules.
        data: of the run.
        numbers: count the work.
        tensorboard: write there, too; the command has looked for the package.
    """

    def __init__(
        self,
        out: Path,
        done: int,
        trainer: Trainer,
        data: StepData,
        numbers: StepNumbers,
        *,
        tensorboard: bool,
    ) -> None:
        super().__init__(out, done, trainer.options.steps, 0)
        self._data, self._trainer, self._numbers = data, trainer, numbers
        self._board: Any = _board(out / "tensorboard", done + 1) if tensorboard else None

    def step(self, done: int, result: StepResult) -> None:
        """Print and record the step after which ``done`` are done."""
        batch = self._data.last
        self.progress.tokens_per_step = batch.tokens
        seconds = self.progress.step(
            done,
            result.loss,
            result.grad_norm,
            lambda seconds: said(self._numbers.of(batch, seconds)),
        )
        values = {
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "grad_norms": self._trainer.optimizer.module_norms,
            "learning_rate": result.learning_rate,
            "learning_rates": dict(result.learning_rates),
            "counted_tokens": result.counted_tokens,
            "tokens": batch.tokens,
            "samples": len(batch.batch.samples),
            "images": batch.images,
            "seconds": seconds,
            "waited_s": self._data.waited_s,
            **self._numbers.of(batch, seconds),
        }
        if not result.success:
            self.progress.say(f"step {done} skipped: {result.problem}")
        skipped = {} if result.success else {"skipped": result.problem}
        self.metrics.write(done, **values, **skipped)
        if self._board is not None:
            for name, value in _scalars(values):
                self._board.add_scalar(name, value, done)

    def close(self) -> None:
        """Close the bar and the files."""
        super().close()
        if self._board is not None:
            self._board.close()


def _scalars(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Single numbers; what a module has is called ``NAME/MODULE``."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}/{module}", each) for module, each in value.items())
        else:
            yield name, value


def _board(folder: Path, first: int) -> Any:
    """What writes for TensorBoard, from a step on; what was written of later steps goes."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=first)
