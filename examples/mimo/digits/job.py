# SPDX-License-Identifier: Apache-2.0
"""One rank's run of the digits job: build, resume or start anew, train, read, report."""

from __future__ import annotations

import gc
import math
import platform
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from data import SEQUENCE_LENGTH, DigitsBatches
from encoders import AUDIO, VISION
from model import LANGUAGE, DigitsModel, Experts, ModelOptions, ModelSize, build_model
from options import Options
from reading import HeldOut
from report import MetricsWriter, Progress, print_table, read_metrics, write_summary
from trainer import StepResult, Trainer, TrainOptions

from megatron.core.models.mimo.memory.policy import EncoderMemory
from megatron.core.models.mimo.training.checkpoint import (
    CheckpointError,
    CheckpointStore,
    Manifest,
    remove_partial,
)
from mimo_colocated.launch import connection_notes, init_distributed
from mimo_colocated.launch.errors import JobError, Stopped, writing
from mimo_colocated.stop_requests import StopRequests

# Changing one of these in mid-run would train on other data or another schedule than recorded.
_FIXED = (
    "seed",
    "steps",
    "global_batch_size",
    "micro_batches",
    "lr",
    "uneven_loss_mask",
    "varied_samples",
    "dtype",
    "language_layers",
    "dropout",
)


class Run:
    """State of one run on one rank.

    Args:
        options: of the job, checked.
        backend: of the process groups, already joined.
        requests: what tells this rank to stop.
    """

    def __init__(
        self, options: Options, backend: str, requests: StopRequests | None = None
    ) -> None:
        self.options, self.backend = options, backend
        self.requests = requests or StopRequests()
        self.rank = dist.get_rank()
        self._skipped_in_a_row = self._saved = 0
        self.built = _build(options, backend)
        self.trainer = Trainer(
            self.built,
            TrainOptions(
                steps=options.steps,
                global_batch_size=options.global_batch_size,
                micro_batches=options.micro_batches,
                encode_ahead=options.encode_ahead,
                lr=options.lr,
                min_lr=options.lr / 10,
                clip_grad=options.clip_grad,
            ),
            options.distributed_optimizer,
        )
        self.store = CheckpointStore(
            options.out / "checkpoints",
            self.built.layouts(),
            self.built.randomness,
            self.built.collections[LANGUAGE].dp_cp,
            digests=options.checkpoint_digests,
        )
        self.train = DigitsBatches(
            options.seed,
            "train",
            options.global_batch_size,
            uneven_loss_mask=options.uneven_loss_mask,
            varied=options.varied_samples,
            audio=options.audio is not None,
        )

    # ---- start ----------------------------------------------------------------------------

    def start(self) -> int:
        """Resume from the last checkpoint or start anew, say which; returns the steps done."""
        if self.options.fresh:
            self._set_aside()
        if self.rank == 0:
            remove_partial(self.store.root)  # of a save that was interrupted
        steps = self.store.steps()
        if not steps:
            self.say(f"starting anew in {self.options.out}")
            return 0
        manifest = self.store.manifest(steps[-1])
        self._check_options(manifest)
        self.store.load(manifest.step, self.trainer.model, self.trainer.optimizer)
        # Skipped steps did not advance it.
        self.trainer.resume_schedule(manifest.extra.get("schedule_step", manifest.step))
        where = self.store.path(manifest.step)
        moved = "" if self.store.same_layout(manifest) else ", saved in another layout"
        self.say(f"resuming after step {manifest.step} from {where}{moved}; --fresh starts anew")
        self._saved = manifest.step
        return manifest.step

    def _check_options(self, manifest: Manifest) -> None:
        # A run that was saved before an option came had what is its default now.
        before = Options().as_dict() | manifest.extra.get("options", {})
        now = self.options.as_dict()
        if (before.get("audio") is None) != (now["audio"] is None):
            had, advice = (
                ("no sounds", "leave out --audio")
                if before.get("audio") is None
                else ("sounds", f"give --audio {before['audio']} (or another layout)")
            )
            raise JobError(
                f"{self.options.out} holds a run with {had}; {advice} to resume it, or give "
                "--fresh to start anew, or another --out"
            )
        changed = [name for name in _FIXED if before.get(name) != now[name]]
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
                _move_results(self.options.out, self.say)
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

    def run(self) -> None:
        """The whole job."""
        # Megatron-Core's distributed optimizer collects garbage at every save and load, which takes
        # 0.2 s of a core per module only to look through what was imported and built until here.
        gc.freeze()
        self._stop_if_told(0)
        done = self.start()
        reporter = _Reporter(self, done) if self.rank == 0 else None
        try:
            while done < self.options.steps:
                self._stop_if_told(done)
                result = self.trainer.step(self.train, done)
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
            self._saving(done, self.store.wait)
        finally:
            if reporter:
                reporter.close()
        read = self.read_held_out() if self.options.evaluate else None
        if reporter:
            reporter.finish(read)
        dist.barrier()

    def _stop_if_told(self, done: int) -> None:
        """Save and stop if a signal told any rank to; all ranks together.

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
        """Write a checkpoint, or begin to; all ranks together."""
        extra = {
            "options": self.options.as_dict(),
            "schedule_step": self.trainer.scheduler.num_steps,
        }
        model, optimizer = self.trainer.model, self.trainer.optimizer
        background = self.options.background_saves
        self._saving(
            done, lambda: self.store.save(done, model, optimizer, extra, background=background)
        )
        self._saved = done

    @staticmethod
    def _saving(done: int, action: Callable[[], Any]) -> None:
        try:
            action()
        except CheckpointError as error:
            raise JobError(f"{error}; training stopped after step {done}") from error

    def read_held_out(self) -> HeldOut | None:
        """What the model reads on all held-out images and sounds, on rank 0."""
        options, audio = self.options, self.options.audio is not None
        held_out = DigitsBatches(options.seed, "held_out", options.eval_batch_size, audio=audio)
        count = len(held_out.images)
        self.say(f"reading {count} held-out images{f' and {count} sounds' * audio}")
        answers = []
        for step in range(len(held_out)):
            self._stop_if_told(options.steps)
            answers.append(self.trainer.read(held_out, step).cpu())
        return HeldOut.collect(held_out, answers) if self.rank == 0 else None


class _Reporter:
    """Rank 0's output: progress, metrics, pictures, summary."""

    def __init__(self, run: Run, done: int) -> None:
        # Here: no other rank draws, and the library for it takes long to import.
        from layout_picture import plot_layout

        self.run, options = run, run.options
        self.out = options.out
        with writing(self.out, "the results"):
            self.out.mkdir(parents=True, exist_ok=True)
        self.metrics = MetricsWriter(self.out / "metrics.jsonl", done + 1 if done else 0)
        plot_layout(
            self.out / "layout.png",
            [bridge.layout for bridge in run.trainer.model.colocated_comms.values()],
            options.global_batch_size // options.micro_batches,
            SEQUENCE_LENGTH,
            sequence_parallel=options.sequence_parallel,
        )
        self.progress = Progress(done, options.steps, options.global_batch_size * SEQUENCE_LENGTH)

    def step(self, done: int, result: StepResult) -> None:
        """Print and record one step."""
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

    def finish(self, read: HeldOut | None) -> None:
        """Pictures, ``summary.json`` and the closing table."""
        from pictures import plot_loss, plot_predictions

        lines = read_metrics(self.out / "metrics.jsonl")
        summary = self._summary(lines)
        plot_loss(self.out / "loss.png", lines, self._title())
        if read is not None:
            kinds = read.accuracies() if self.run.options.audio else None
            summary["test_accuracy"] = plot_predictions(
                self.out / "predictions.png",
                read.images,
                read.truth,
                read.read,
                read.counted,
                waveforms=read.waveforms,
                by_kind=kinds,
            )
            if kinds:
                summary["test_accuracy_by_kind"] = kinds
        write_summary(self.out / "summary.json", summary)
        print_table(summary)
        self.run.say(f"results are in {self.out}")

    def _title(self) -> str:
        options = self.run.options
        sides = {**options.pair.encoders, "language": options.language}
        return " | ".join(f"{name} {layout}" for name, layout in sides.items())

    def _summary(self, lines: list[dict[str, Any]]) -> dict[str, Any]:
        options = self.run.options
        seconds = self.progress.seconds_per_step
        if not math.isfinite(seconds):  # nothing was left to train: what was measured then
            measured = sorted(line["seconds"] for line in lines)
            seconds = measured[len(measured) // 2] if measured else math.nan
        layouts = self.run.built.layouts()
        names = {"vision": VISION, "audio": AUDIO, "language": LANGUAGE}
        return {
            **{side: layouts[name] for side, name in names.items() if name in layouts},
            "world_size": dist.get_world_size(),
            "backend": self.run.backend,
            "versions": _versions(),
            "seed": options.seed,
            "steps": options.steps,
            "final_loss": lines[-1]["loss"] if lines else None,
            "test_accuracy": None,
            "seconds_per_step": seconds,
        }


def _build(options: Options, backend: str) -> DigitsModel:
    layouts = (options.vision, options.language)
    return build_model(*layouts, model_options(options), backend, audio=options.audio)


def model_options(options: Options) -> ModelOptions:
    """How the job's options have the model built."""
    return ModelOptions(
        size=ModelSize(language_layers=options.language_layers),
        virtual_stages=options.virtual_stages,
        seed=options.seed,
        dtype=getattr(torch, options.dtype),
        sequence_parallel=options.sequence_parallel,
        packed=options.packed,
        varied_lengths=options.varied_samples,
        bridge=options.bridge,
        distributed_optimizer=options.distributed_optimizer,
        overlap_grad_reduce=options.overlap_grad_reduce,
        overlap_param_gather=options.overlap_param_gather and options.distributed_optimizer,
        experts=_experts(options.experts),
        freeze=options.freeze,
        dropout=options.dropout,
        recompute=options.recompute,
        # The images are small, so that little would be worth a copy with the default.
        memory=EncoderMemory(options.encoder_memory, options.projector_memory, offload_from=1024),
    )


def _experts(count: int) -> Experts | None:
    """Balanced by the loss per sample, which is the same in every layout."""
    if not count:
        return None
    return Experts(count, min(2, count), balance="seq_aux_loss", balance_coeff=1e-3)


def _move_results(out: Path, say: Any) -> None:
    names = ("checkpoints", "metrics.jsonl", "summary.json", "errors")
    pictures = ("loss.png", "predictions.png", "layout.png")
    present = [out / name for name in names + pictures if (out / name).exists()]
    if not present:
        return
    shelf = out / "previous"
    number = 1 + max((int(p.name) for p in shelf.glob("[0-9]*")), default=0)
    target = shelf / str(number)
    target.mkdir(parents=True)
    for path in present:
        shutil.move(str(path), target / path.name)
    say(f"--fresh: the earlier results are in {target}")


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("megatron-core", "megatron-mimo-colocated"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def run_job(options: Options, backend: str, requests: StopRequests) -> None:
    """Run the job on this rank.

    Raises:
        JobError: what the user has to know, the same sentence on every rank.
        Stopped: it was told to stop, and has saved.
    """
    try:
        with connection_notes.held_back():
            init_distributed(backend, options.timeout)
            run = Run(options, backend, requests)
        run.run()
    except CheckpointError as error:
        raise JobError(str(error)) from error
    sys.stdout.flush()
