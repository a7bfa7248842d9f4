# SPDX-License-Identifier: Apache-2.0
"""What rank 0 reports of a job: progress, metrics and plots while it runs, a summary at its end."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron.core.models.mimo.job.results import (
    MetricsWriter,
    Progress,
    print_table,
    read_metrics,
    write_summary,
)
from megatron.core.models.mimo.job.trainer import StepResult
from mimo_colocated.launch.errors import writing


class Reporter:
    """Writes ``metrics.jsonl``, ``loss.png`` and ``summary.json``, and prints a line per step.

    Args:
        out: folder of the results; it is made.
        done: steps that are done already.
        steps: in all.
        tokens_per_step: of the global batch, padding included.

    Raises:
        JobError: the folder cannot be written.
    """

    def __init__(self, out: Path, done: int, steps: int, tokens_per_step: int) -> None:
        self.out = out
        with writing(out, "the results"):
            out.mkdir(parents=True, exist_ok=True)
        self.metrics = MetricsWriter(out / "metrics.jsonl", done + 1 if done else 0)
        self.progress = Progress(done, steps, tokens_per_step)

    def step(self, done: int, result: StepResult) -> None:
        """Print and record the step after which ``done`` are done."""
        seconds = self.progress.step(done, result.loss, result.grad_norm)
        if not result.success:
            self.progress.say(f"step {done} skipped: {result.problem}")
        self.metrics.write(
            done,
            loss=result.loss,
            grad_norm=result.grad_norm,
            counted_tokens=result.counted_tokens,
            learning_rate=result.learning_rate,
            seconds=seconds,
            **({} if result.success else {"skipped": result.problem, "nonfinite": result.modules}),
        )

    def close(self) -> None:
        """Close the bar and the metrics file."""
        self.progress.close()
        self.metrics.close()

    def summary(self, layouts: Mapping[str, Any], backend: str, seed: int) -> dict[str, Any]:
        """Return what ``summary.json`` says of any job, on rank 0.

        Args:
            layouts: module -> sizes of its axes.
            backend: of the process groups.
            seed: of the job.
        """
        lines = read_metrics(self.out / "metrics.jsonl")
        seconds = self.progress.seconds_per_step
        if not math.isfinite(seconds):  # nothing was left to train: what was measured then
            measured = sorted(line["seconds"] for line in lines)
            seconds = measured[len(measured) // 2] if measured else math.nan
        return {
            **layouts,
            "world_size": dist.get_world_size(),
            "backend": backend,
            "versions": versions(),
            "seed": seed,
            "steps": self.progress.steps,
            "final_loss": lines[-1]["loss"] if lines else None,
            "test_accuracy": None,
            "seconds_per_step": seconds,
        }

    def finish(self, name: str, title: str, label: str, summary: Mapping[str, Any]) -> None:
        """Draw the loss, write the summary, and print it as a table.

        Args:
            name: above the table.
            title: of the loss, says which job it is.
            label: of the loss's axis.
            summary: key -> value.
        """
        from megatron.core.models.mimo.job.plots import plot_loss

        plot_loss(self.out / "loss.png", read_metrics(self.out / "metrics.jsonl"), title, label)
        write_summary(self.out / "summary.json", summary)
        print_table(name, summary)
        print(f"results are in {self.out}", flush=True)


def versions(*more: str) -> dict[str, str]:
    """Return the versions of Python and of what the job stands on, ``more`` packages too."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("megatron-core", *more, "megatron-mimo-colocated"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
