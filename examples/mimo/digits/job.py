# SPDX-License-Identifier: Apache-2.0
"""One rank of the digits job: build, resume or start anew, train, read, report."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from examples.mimo.digits.data import (
    DIGITS_PER_SAMPLE,
    READING_POSITIONS,
    SEQUENCE_LENGTH,
    VOCABULARY_SIZE,
    Batch,
    DigitsBatches,
    Token,
    with_answer,
)
from examples.mimo.digits.model import MODALITIES, build_model
from examples.mimo.digits.options import Options
from megatron.core.models.mimo.checkpoint.store import CheckpointError
from megatron.core.models.mimo.job.built_model import LANGUAGE
from megatron.core.models.mimo.job.logits import gather
from megatron.core.models.mimo.job.loop import TrainingLoop
from megatron.core.models.mimo.job.packing import packed_inputs
from megatron.core.models.mimo.job.reporter import Reporter
from megatron.core.models.mimo.job.trainer import Trainer, TrainOptions
from mimo_colocated import phases
from mimo_colocated.launch import JobError, connection_notes, init_distributed
from mimo_colocated.stop_requests import StopRequests

if TYPE_CHECKING:
    from examples.mimo.digits.predictions import HeldOut


class DigitsTrainer(Trainer):
    """Steps over :class:`DigitsBatches`, and reads the held-out ones."""

    def microbatches(self, data: DigitsBatches, step: int) -> Iterator[Mapping[str, Any]]:
        """What the model is called with, microbatch by microbatch."""
        count = self.options.micro_batches
        for microbatch in range(count):
            yield self.inputs(self.local_batch(data, step, microbatch, count))

    def local_batch(self, data: DigitsBatches, step: int, microbatch: int, count: int) -> Batch:
        """This rank's part of a microbatch, with its routes, on its device."""
        with phases.during(phases.DATA):
            at = (step, microbatch, count)
            batch = data.local_batch(*at, self.parts())
            lengths = data.lengths(*at) if self.packed else None
            tokens = {
                name: data.tokens(MODALITIES[name].token, *at) for name in self.plans.bridges
            }
            return replace(batch, routes=self.plans.of(tokens, lengths)).to(self.device)

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """What the model is called with."""
        inputs: dict[str, Any] = {
            "input_ids": batch.input_ids,
            "position_ids": batch.position_ids,
            "labels": batch.labels,
            "loss_mask": batch.loss_mask,
        }
        if self.packed:
            inputs = packed_inputs(inputs, batch.lengths, self.multiple)
        there = [name for name in MODALITIES if name in self.built.collections]
        shown = {name: MODALITIES[name].inputs(batch.items(name)) for name in there}
        return {**inputs, "modality_inputs": shown, "route_plan": batch.routes}

    def logits(self, batch: Batch) -> torch.Tensor:
        """``(b, S, V)`` of this rank's samples, on every stage; zeros where a packed one is cut."""
        inputs = self.inputs(replace(batch, labels=None, loss_mask=None))
        return self.whole_logits(inputs, batch.lengths, (*batch.input_ids.shape, VOCABULARY_SIZE))

    @torch.no_grad()
    def read(self, data: DigitsBatches, step: int) -> torch.Tensor:
        """Digits that the model answers for the held-out batch ``step``, ``(B, 4)`` int64.

        The answer is produced token by token: each digit is fed back before the next is asked
        for. Every rank returns the whole batch's answers; -1 stands for a token that is no digit.
        """
        phases.at_step(step, "evaluation batch")
        self.model.eval()
        batch = self.local_batch(data, step, 0, 1)
        read = batch.input_ids.new_zeros((len(batch.input_ids), 0))
        for position in READING_POSITIONS:
            input_ids = with_answer(batch.input_ids, read.clamp(min=0))
            logits = self.logits(replace(batch, input_ids=input_ids))
            digit = logits[:, position].argmax(dim=-1) - int(Token.ZERO)
            digit = torch.where((digit >= 0) & (digit <= 9), digit, -1)
            read = torch.cat([read, digit[:, None]], dim=1)
        assert read.shape[1] == DIGITS_PER_SAMPLE
        return gather(read, self.groups.dp, dim=0)


class DigitsLoop(TrainingLoop):
    """The whole job on one rank; the process group is there."""

    fixed = (*TrainingLoop.fixed, "uneven_loss_mask", "varied_samples")

    def __init__(self, options: Options, backend: str, requests: StopRequests) -> None:
        built, steps = build_model(options, backend), TrainOptions.of(options)
        trainer = DigitsTrainer(built, steps, options.distributed_optimizer)
        data = DigitsBatches(
            options.seed,
            "train",
            options.global_batch_size,
            uneven_loss_mask=options.uneven_loss_mask,
            varied=options.varied_samples,
            audio=options.audio is not None,
        )
        super().__init__(options, trainer, data, requests)
        self.backend = backend

    def check_options(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        """Refuse to resume a run with sounds without them, too, and the other way round."""
        had, has = before.get("audio"), now["audio"]
        if (had is None) != (has is None):
            said, advice = (
                ("no sounds", "leave out --audio")
                if had is None
                else ("sounds", f"give --audio {had} (or another layout)")
            )
            raise JobError(
                f"{self.options.out} holds a run with {said}; {advice} to resume it, or give "
                "--fresh to start anew, or another --out"
            )
        super().check_options(before, now)

    def run(self) -> None:
        """Train, read the held-out digits, report."""
        reporter = self.train(SEQUENCE_LENGTH)
        read = self._read_held_out() if self.options.evaluate else None
        if reporter:
            self._finish(reporter, read)
        dist.barrier()

    def _read_held_out(self) -> HeldOut | None:
        """What the model reads on all held-out images and sounds, on rank 0."""
        options, audio = self.options, self.options.audio is not None
        held_out = DigitsBatches(options.seed, "held_out", options.eval_batch_size, audio=audio)
        count = len(held_out.images)
        self.say(f"reading {count} held-out images{f' and {count} sounds' * audio}")
        answers = []
        for step in range(len(held_out)):
            self.stop_if_told(options.steps)
            answers.append(self.trainer.read(held_out, step).cpu())
        if self.rank != 0:
            return None
        # Here: no other rank draws, and the library for it takes long to import.
        from examples.mimo.digits.predictions import HeldOut

        return HeldOut.collect(held_out, answers)

    def _finish(self, reporter: Reporter, read: HeldOut | None) -> None:
        options, layouts = self.options, self.trainer.built.layouts()
        names = {**{kind.side: name for name, kind in MODALITIES.items()}, LANGUAGE: LANGUAGE}
        shown = {side: layouts[name] for side, name in names.items() if name in layouts}
        summary = reporter.summary(shown, self.backend, options.seed)
        if read is not None:
            from examples.mimo.digits.predictions import plot_predictions

            kinds = read.accuracies() if options.audio else None
            summary["test_accuracy"] = plot_predictions(
                options.out / "predictions.png",
                read.images,
                read.truth,
                read.read,
                read.counted,
                waveforms=read.waveforms,
                by_kind=kinds,
            )
            if kinds:
                summary["test_accuracy_by_kind"] = kinds
        title = " | ".join(f"{name} {at}" for name, at in options.layouts.modules.items())
        reporter.finish("Digits", title, "loss per answer digit", summary)


def run_job(options: Options, backend: str, requests: StopRequests) -> None:
    """Run the job on this rank; raises ``JobError`` or ``Stopped``, the same on every rank."""
    try:
        with connection_notes.held_back():
            init_distributed(backend, options.timeout)
            loop = DigitsLoop(options, backend, requests)
        loop.run()
    except CheckpointError as error:
        raise JobError(str(error)) from error
    sys.stdout.flush()
