# SPDX-License-Identifier: Apache-2.0
"""What rank 0 tells of every step: a line, ``metrics.jsonl``, boards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron.core.models.mimo.job.reporter import Reporter
from megatron.core.models.mimo.job.trainer import StepResult, Trainer
from mimo_colocated.train.boards import Board
from mimo_colocated.train.clock import PhaseClock, said_times, with_other
from mimo_colocated.train.data import StepData
from mimo_colocated.train.numbers import StepNumbers, said


class RecipeReporter(Reporter):
    """Also tells tokens, images or sounds, the work of a step, and where its time went.

    Args:
        out: folder of the results.
        done: steps that are done already.
        trainer: of the model, for the gradient norms of its modules.
        data: of the run.
        numbers: count the work.
        boards: are written to, too.
    """

    def __init__(
        self,
        out: Path,
        done: int,
        trainer: Trainer,
        data: StepData,
        numbers: StepNumbers,
        *,
        boards: Sequence[Board],
    ) -> None:
        super().__init__(out, done, trainer.options.steps, 0)
        self._data, self._trainer, self._numbers = data, trainer, numbers
        self._items = "sounds" if "audio" in numbers.shapes.encoders else "images"
        self._boards = boards
        self._clock = PhaseClock(on_gpu=trainer.device.type == "cuda")

    def step(self, done: int, result: StepResult) -> None:
        """Print and record the step after which ``done`` are done."""
        batch, times = self._data.last, self._clock.read()
        self.progress.tokens_per_step = batch.tokens
        work: dict[str, Any] = {}

        def line(seconds: float) -> str:
            work.update(self._numbers.of(batch, seconds), times=with_other(times, seconds))
            work.update(self._numbers.by_part(work["tflop"], times))
            return f"{said(work)}  {said_times(work['times'])}"

        seconds = self.progress.step(done, result.loss, result.grad_norm, line)
        values = {
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "grad_norms": self._trainer.optimizer.module_norms,
            "learning_rate": result.learning_rate,
            "learning_rates": dict(result.learning_rates),
            "counted_tokens": result.counted_tokens,
            "tokens": batch.tokens,
            "samples": len(batch.batch.samples),
            self._items: batch.images,
            "seconds": seconds,
            "waited_s": self._data.waited_s,
            "spread_before": {name: before for name, (before, _) in batch.spreads.items()},
            "spread_after": {name: after for name, (_, after) in batch.spreads.items()},
            **work,
        }
        if not result.success:
            self.progress.say(f"step {done} skipped: {result.problem}")
        skipped = {} if result.success else {"skipped": result.problem}
        self.metrics.write(done, **values, **skipped)
        for board in self._boards:
            board.write(done, dict(_scalars(values)))

    def close(self) -> None:
        """Close the bar, the clock and the files."""
        self._clock.close()
        super().close()
        for board in self._boards:
            board.close()


def _scalars(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Single numbers; what a module has is called ``NAME/MODULE``."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}/{module}", each) for module, each in value.items())
        else:
            yield name, value
