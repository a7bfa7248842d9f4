# SPDX-License-Identifier: Apache-2.0
"""A job from its last checkpoint to its last step: it saves, stops when told, and gives up."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron.core.models.mimo.checkpoint.store import (
    CheckpointError,
    CheckpointStore,
    Manifest,
    remove_partial,
)
from megatron.core.models.mimo.job.built_model import LANGUAGE
from megatron.core.models.mimo.job.reporter import Reporter
from megatron.core.models.mimo.job.trainer import StepResult, Trainer
from mimo_colocated.launch.errors import JobError, Stopped
from mimo_colocated.launch.training_options import TrainingOptions
from mimo_colocated.stop_requests import StopRequests


class TrainingLoop:
    """Trains on one rank, all ranks together.

    Args:
        options: of the job, checked.
        trainer: makes the steps.
        data: what the trainer steps over.
        requests: what tells this rank to stop.

    Attributes:
        store: of the checkpoints, below ``options.out``.
    """

    fixed: tuple[str, ...] = (
        "seed",
        "steps",
        "global_batch_size",
        "micro_batches",
        "lr",
        "dtype",
        "language_layers",
        "dropout",
    )
    """Options that may not change in mid-run: it would train on other data than recorded."""
    results: tuple[str, ...] = (
        *("checkpoints", "metrics.jsonl", "summary.json", "answers.json", "errors", "tensorboard"),
        *("loss.png", "predictions.png", "layout.png", "report.html", "recipe.yaml", "run.json"),
    )
    """What a run leaves in ``options.out``; ``--fresh`` sets it aside."""

    def __init__(
        self,
        options: TrainingOptions,
        trainer: Trainer,
        data: Any,
        requests: StopRequests,
    ) -> None:
        self.options, self.trainer, self.data = options, trainer, data
        self.requests = requests
        self.rank, built = dist.get_rank(), trainer.built
        self._skipped_in_a_row = self._saved = 0
        self.store = CheckpointStore(
            options.out / "checkpoints",
            built.layouts(),
            built.randomness,
            built.collections[LANGUAGE].dp_cp,
            digests=options.checkpoint_digests,
        )

    # ---- start ----------------------------------------------------------------------------

    def start(self) -> int:
        """Resume from the last checkpoint or start anew, say which; return the steps done.

        Raises:
            JobError: the checkpoint is of a run with other options.
            CheckpointError: it cannot be loaded.
        """
        if self.options.fresh:
            self._set_aside()
        if self.rank == 0:
            remove_partial(self.store.root)  # of a save that was interrupted
        steps = self.store.steps()
        if not steps:
            self.say(f"starting anew in {self.options.out}")
            return 0
        manifest = self.store.manifest(steps[-1])
        # A run that was saved before an option came had what is its default now.
        before = type(self.options)().as_dict() | manifest.extra.get("options", {})
        self.check_options(before, self.options.as_dict())
        self._load(manifest)
        return manifest.step

    def _load(self, manifest: Manifest) -> None:
        self.store.load(manifest.step, self.trainer.model, self.trainer.optimizer)
        # Skipped steps did not advance it.
        self.trainer.resume_schedule(manifest.extra.get("schedule_step", manifest.step))
        where = self.store.path(manifest.step)
        moved = "" if self.store.same_layout(manifest) else ", saved in another layout"
        self.say(f"resuming after step {manifest.step} from {where}{moved}; --fresh starts anew")
        self._saved = manifest.step

    def check_options(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        """Refuse to resume a run with other options than those of :attr:`fixed`.

        Args:
            before: the options that the run was saved with.
            now: this job's.

        Raises:
            JobError: the first that changed, and what to do.
        """
        changed = [name for name in self.fixed if before.get(name) != now[name]]
        if changed:
            name = changed[0]
            flag = f"--{name.replace('_', '-')}"
            raise JobError(
                f"{self.options.out} holds a run with {flag} {before.get(name)}, this one has "
                f"{now[name]}; give {flag} {before.get(name)} to resume it, --fresh to start "
                "anew, or another --out"
            )

    def _set_aside(self) -> None:
        """``--fresh``: earlier results move to ``previous/N``; nothing is deleted."""
        failure = [None]
        if self.rank == 0:
            try:
                _move_results(self.options.out, self.results, self.say)
            except OSError as error:
                failure = [f"earlier results in {self.options.out} cannot be moved: {error}"]
        dist.broadcast_object_list(failure, src=0)
        if failure[0]:
            raise JobError(failure[0])

    def say(self, line: str) -> None:
        """Print on rank 0."""
        if self.rank == 0:
            print(line, flush=True)

    # ---- training -------------------------------------------------------------------------

    def train(self, sequence_length: int) -> Reporter | None:
        """Train to the last step, all ranks together.

        Args:
            sequence_length: tokens of a sample, for what rank 0 reports.

        Returns:
            The reporter, on rank 0.

        Raises:
            JobError: the job cannot go on.
            Stopped: it was told to stop, and has saved.
        """
        # Megatron-Core's distributed optimizer collects garbage at every save and load, which takes
        # 0.2 s of a core per module only to look through what was imported and built until here.
        gc.freeze()
        self.stop_if_told(0)
        done = self.start()
        reporter = self._reporter(done, sequence_length) if self.rank == 0 else None
        try:
            while done < self.options.steps:
                done = self._step(done, reporter)
            self._saving(done, self.store.wait)
        finally:
            if reporter:
                reporter.close()
        return reporter

    def _reporter(self, done: int, sequence_length: int) -> Reporter:
        # Here: no other rank draws, and the library for it takes long to import.
        from megatron.core.models.mimo.job.layout_plot import plot_layout

        options = self.options
        tokens = options.global_batch_size * sequence_length
        reporter = Reporter(options.out, done, options.steps, tokens)
        plot_layout(
            options.out / "layout.png",
            [bridge.layout for bridge in self.trainer.model.colocated_comms.values()],
            options.global_batch_size // options.micro_batches,
            sequence_length,
            sequence_parallel=options.sequence_parallel,
        )
        return reporter

    def _step(self, done: int, reporter: Reporter | None) -> int:
        self.stop_if_told(done)
        result = self.trainer.step(self.data, done)
        done += 1
        if reporter:
            reporter.step(done, result)
        self._stop_if_stuck(done, result)
        if self._is_save_step(done):
            self.save(done)
            if reporter:
                reporter.progress.pause()
        else:
            self._saving(done, self.store.poll)
        return done

    def stop_if_told(self, done: int) -> None:
        """Save and stop if a signal told any rank to; all ranks together.

        Args:
            done: steps that are done.

        Raises:
            Stopped: where the checkpoint is, and how to go on.
        """
        told = self.requests.agreed(self.trainer.device)
        if told is None:
            return
        if not done:
            raise Stopped(f"stopped by {told.name} before any step; the same command starts again")
        if self._saved < done:
            self.save(done)
        self._saving(done, self.store.wait)
        again = f"the same command{' without --fresh' if self.options.fresh else ''}"
        raise Stopped(
            f"stopped by {told.name} after step {done} of {self.options.steps}, which is saved in "
            f"{self.store.path(done)}; {again} goes on from there"
        )

    def _stop_if_stuck(self, done: int, result: StepResult) -> None:
        """Give up after ``--max-skipped`` skipped steps in a row; the same on every rank.

        Raises:
            JobError: what was not finite in the last one.
        """
        if result.success or result.scaling:
            self._skipped_in_a_row = 0
            return
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row >= self.options.max_skipped:
            self._saving(done, self.store.wait)  # what was saved before is worth going on from
            raise JobError(
                f"step {done} was skipped, the last of {self._skipped_in_a_row} in a row: "
                f"{result.problem}; use a smaller --lr (now {self.options.lr:g}) and --fresh, or "
                "look at what that part of the model reads"
            )

    def _is_save_step(self, done: int) -> bool:
        every = self.options.save_every
        return every > 0 and (done % every == 0 or done == self.options.steps)

    def save(self, done: int) -> None:
        """Write a checkpoint of ``done`` steps, or begin to; all ranks together.

        Raises:
            JobError: it cannot be written.
        """
        extra = {
            "options": self.options.as_dict(),
            "schedule_step": self.trainer.scheduler.num_steps,
            **self.more_to_save(),
        }
        model, optimizer = self.trainer.model, self.trainer.optimizer
        background = self.options.background_saves
        self._saving(
            done, lambda: self.store.save(done, model, optimizer, extra, background=background)
        )
        self._saved = done

    def more_to_save(self) -> dict[str, Any]:
        """Return further JSON values for a checkpoint's manifest; a subclass may have some."""
        return {}

    @staticmethod
    def _saving(done: int, action: Callable[[], Any]) -> None:
        try:
            action()
        except CheckpointError as error:
            raise JobError(f"{error}; training stopped after step {done}") from error


def _move_results(out: Path, names: Sequence[str], say: Callable[[str], None]) -> None:
    present = [out / name for name in names if (out / name).exists()]
    if not present:
        return
    shelf = out / "previous"
    number = 1 + max((int(p.name) for p in shelf.glob("[0-9]*")), default=0)
    target = shelf / str(number)
    target.mkdir(parents=True)
    for path in present:
        shutil.move(str(path), target / path.name)
    say(f"--fresh: the earlier results are in {target}")
