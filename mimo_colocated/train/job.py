# SPDX-License-Identifier: Apache-2.0
"""One rank of a recipe: build, resume or start anew, train, export, evaluate."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron.core.models.mimo.checkpoint.store import Manifest
from megatron.core.models.mimo.data.encoding import ChatEncoder, TemplateError
from megatron.core.models.mimo.data.loader import RankBatches, Side
from megatron.core.models.mimo.data.readers import Reader
from megatron.core.models.mimo.data.sources import SourceError
from megatron.core.models.mimo.gradients.finalize import iter_modules
from megatron.core.models.mimo.huggingface.all_ranks import on_all_ranks
from megatron.core.models.mimo.huggingface.build import BuildOptions, from_folder
from megatron.core.models.mimo.huggingface.export import to_folder
from megatron.core.models.mimo.job.built_model import LANGUAGE
from megatron.core.models.mimo.job.loop import TrainingLoop
from megatron.core.models.mimo.job.reporter import Reporter, versions
from megatron.core.models.mimo.job.results import read_metrics, write_summary
from megatron.core.models.mimo.job.trainer import TrainOptions
from mimo_colocated.cli import models
from mimo_colocated.cli.importing import RECORD, source_of
from mimo_colocated.launch import JobError, connection_notes, init_distributed
from mimo_colocated.launch.training_options import TrainingOptions
from mimo_colocated.stop_requests import StopRequests
from mimo_colocated.train.answers import Answer, Greedy, majority, stop_at, wanted
from mimo_colocated.train.data import (
    Opened,
    StepData,
    held_out_stream,
    open_data,
    side_of,
    training_stream,
)
from mimo_colocated.train.items import readers_of, shared_reads
from mimo_colocated.train.makers import make_model
from mimo_colocated.train.numbers import StepNumbers
from mimo_colocated.train.plan import check_model
from mimo_colocated.train.recipe import DataPart, Recipe
from mimo_colocated.train.record import write_record
from mimo_colocated.train.reporting import RecipeReporter
from mimo_colocated.train.trainer import RecipeTrainer

# Fields of a recipe that may not change in mid-run: it would train on other data than recorded.
_FIXED = (
    *(f"model.{name}" for name in ("folder", "make", "settings", "dtype")),
    *(f"data.{name}" for name in ("train", "max_tokens", "sequences", "capacity")),
    *(f"training.{name}" for name in ("steps", "global_batch_size", "lr", "min_lr")),
    *(f"training.{name}" for name in ("warmup_steps", "weight_decay", "seed")),
)


@dataclass(frozen=True)
class RunOptions(TrainingOptions):
    """What the loop of a job reads, out of a recipe."""

    recipe: Recipe | None = None

    @classmethod
    def of(cls, recipe: Recipe, *, fresh: bool) -> RunOptions:
        """Return the options of a recipe."""
        training, run = recipe.training, recipe.run
        return cls(
            recipe=recipe,
            language=recipe.language,
            steps=training.steps,
            seed=training.seed,
            global_batch_size=training.global_batch_size,
            micro_batches=training.micro_batches,
            lr=training.lr,
            clip_grad=training.clip_grad,
            max_skipped=training.max_skipped,
            save_every=training.save_every,
            timeout=run.timeout,
            backend=run.backend,
            out=Path(run.out),
            fresh=fresh,
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the recipe, for checkpoints."""
        return {"recipe": dataclasses.asdict(self.recipe) if self.recipe else {}}


class RecipeLoop(TrainingLoop):
    """From the last checkpoint to the last step, over a recipe's data.

    Args:
        options: of the recipe.
        trainer: makes the steps.
        data: what the trainer steps over.
        requests: what tells this rank to stop.
        opened: what is trained on.
    """

    results = (*TrainingLoop.results, "recipe.yaml", "run.json", "exported")

    def __init__(
        self,
        options: RunOptions,
        trainer: RecipeTrainer,
        data: StepData,
        requests: StopRequests,
        opened: Opened,
    ) -> None:
        super().__init__(options, trainer, data, requests)
        self.opened = opened

    def start(self) -> int:
        """Resume or start anew, and record the run, unless it is refused."""
        done = super().start()
        options: Any = self.options
        found = self.found()
        on_all_ranks(lambda: write_record(options.out, options.recipe, found), "write the record")
        return done

    def found(self) -> dict[str, Any]:
        """Return what the record and the summary tell: layouts, and what was skipped."""
        return {"layouts": self.trainer.built.layouts(), "skipped": self.opened.skipped()}

    def _reporter(self, done: int, sequence_length: int) -> Reporter:
        options: Any = self.options
        model, run = options.recipe.model, options.recipe.run
        built: Any = self.trainer.built
        numbers = StepNumbers.of_model(
            built.composite, options.language, model.freeze, model.dtype
        )
        return RecipeReporter(
            options.out, done, self.trainer, self.data, numbers, tensorboard=run.tensorboard
        )

    def more_to_save(self) -> dict[str, Any]:
        """Return the position in the data, and where the model came from."""
        built: Any = self.trainer.built
        return {
            "position": self.data.position,
            "kept": self.opened.kept(),
            RECORD: source_of(built.source, built),
        }

    def _load(self, manifest: Manifest) -> None:
        before = manifest.extra.get("kept")  # not in what older versions saved
        kept = self.opened.kept()
        if before is not None and before != kept:
            was, now = ([each["samples"] for each in one] for one in (before, kept))
            raise JobError(
                f"{self.options.out} holds a run over {was} samples, and its data has {now} now"
                f"{', other ones' if was == now else ''}; put the data back to resume it, give "
                "--fresh to start anew, or another run.out"
            )
        super()._load(manifest)
        self.data.position = manifest.extra["position"]

    def check_options(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        """Refuse to go on with other data or another schedule than the run had.

        Raises:
            JobError: the first field that changed, and what to do.
        """
        for name in _FIXED:
            section, field = name.split(".")
            was, new = before["recipe"].get(section, {}).get(field), now["recipe"][section][field]
            if was != new:
                raise JobError(
                    f"{self.options.out} holds a run with {name}={was}, this one has {new}; give "
                    f"--set {name}={was} to resume it, --fresh to start anew, or another run.out"
                )


class RecipeJob:
    """A recipe on one rank; the process group is there.

    Args:
        recipe: what to run.
        folder: of the model.
        readers: modality -> reader of its items.
        requests: what tells this rank to stop.
        fresh: start anew instead of resuming.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        readers: dict[str, Reader],
        requests: StopRequests,
        *,
        fresh: bool,
    ) -> None:
        self.recipe, self.folder, self.readers = recipe, folder, readers
        data, training = recipe.data, recipe.training
        self._retry = fresh or not any((Path(recipe.run.out) / "checkpoints").glob("*"))
        self._text = None if recipe.of_tokens else self._text_of(folder)
        self.opened = self._open(data.train, 0)
        # What is wrong with it is not to be found when all is trained.
        self._held_out, self._questions = self._open_held_out()
        layouts = on_all_ranks(lambda: check_model(recipe, folder), "read the model")
        built = from_folder(folder, layouts, self._build_options())
        options = RunOptions.of(recipe, fresh=fresh)
        steps = dataclasses.replace(
            TrainOptions.of(options),
            min_lr=training.min_lr,
            warmup_steps=training.warmup,
            weight_decay=training.weight_decay,
        )
        self.trainer = RecipeTrainer(built, steps, distributed_optimizer=True)
        stream = training_stream(
            self.opened, data, training.seed, training.global_batch_size
        )
        self._share = shared_reads(built)
        side = self._side(data, training.micro_batches)
        batches = RankBatches(stream, self.opened.sources, side)
        self.data = StepData(batches, training.steps, data.ahead)
        self.loop = RecipeLoop(options, self.trainer, self.data, requests, self.opened)

    def run(self) -> None:
        """Train, export, evaluate, and say how it went."""
        out = Path(self.recipe.run.out)
        self._say_data()
        try:
            self.loop.train(0)
        finally:
            self.data.close()
        summary: dict[str, Any] = {
            "recipe": self.recipe.name,
            "versions": versions(),
            **self.loop.found(),
        }
        if self.recipe.run.export:
            to_folder(self.trainer.built, out / "exported", overwrite=True)  # type: ignore[arg-type]
            if self._text is not None and self.loop.rank == 0:
                stop_at(out / "exported", self._text.end)
            self.loop.say(f"wrote {out / 'exported'}, a Hugging Face folder")
        if self.recipe.data.held_out:
            summary["held_out_skipped"] = self._held_out.skipped()
            summary["questions_skipped"] = self._questions.skipped()
            summary |= self._evaluate()
        if self.loop.rank == 0:
            # Here: no other rank draws, and the library for it takes long to import.
            from mimo_colocated.train.report import waited_share, write_report

            share = waited_share(read_metrics(out / "metrics.jsonl"))
            self.loop.say(f"waiting for data: {share:.1%} of the time of the steps")
            write_summary(out / "summary.json", {**summary, "waiting_for_data": share})
            self.loop.say(f"wrote {write_report(out)}, the run on one page")
        self.loop.say(f"results are in {out}")
        dist.barrier()

    # ---- parts ----------------------------------------------------------------------------

    def _open(self, parts: Any, answer_tokens: int) -> Opened:
        place = Path(self.recipe.run.out) / "prepared"
        text = self._text or self._vocabulary()
        return open_data(parts, self.recipe.data, text, place, answer_tokens, self._retry)

    def _open_held_out(self) -> tuple[Opened, Opened]:
        """What the loss is measured on, and the same to be answered."""
        parts = self.recipe.data.held_out
        held_out = self._open(parts, 0)
        if self._text is None or not parts:
            return held_out, held_out
        return held_out, self._open(parts, self.recipe.evaluation.answer_tokens)

    def _text_of(self, folder: Path) -> ChatEncoder:
        longest = self.recipe.data.max_tokens
        return on_all_ranks(lambda: ChatEncoder(folder, longest), "open its text")

    @property
    def encoder(self) -> ChatEncoder:
        """Of conversations.

        Raises:
            AssertionError: the data is tokens already.
        """
        assert self._text is not None
        return self._text

    @property
    def _padding(self) -> int:
        return 0 if self._text is None else self._text.padding

    def _vocabulary(self) -> int:
        return models.described(self.folder).language.config.vocab_size

    def _build_options(self) -> BuildOptions:
        recipe = self.recipe
        return BuildOptions(
            dtype=models.torch_dtype(recipe.model.dtype),
            sequence_parallel=recipe.layout.sequence_parallel,
            packed=recipe.data.packed,
            recompute=recipe.training.recompute,
            seed=recipe.training.seed,
            freeze=self._freeze,
            torch_native=recipe.model.torch_native,
        )

    def _freeze(self, model: Any) -> None:
        known: dict[str, list[Any]] = {}
        for name, module in iter_modules(model):
            known[name] = [module]
            if name != LANGUAGE:
                known[f"{name}.encoder"] = list(module.encoders.values())
                known[f"{name}.projector"] = list(module.input_projections)
        for name in self.recipe.model.freeze:
            if name not in known:
                raise JobError(f"model.freeze: {name!r} is none of {', '.join(known)}")
            for module in known[name]:
                module.requires_grad_(False)

    def _say_data(self) -> None:
        for name, opened in (
            ("training data", self.opened),
            ("held-out data", self._held_out),
            ("questions", self._questions),
        ):
            count, skipped = sum(len(each) for each in opened.prepared), opened.skipped()
            if count:
                said = ", ".join(f"{n} {reason}" for reason, n in skipped.items()) or "none"
                self.loop.say(f"{name}: {count} samples, skipped: {said}")

    # ---- evaluation -----------------------------------------------------------------------

    def _evaluate(self) -> dict[str, Any]:
        """Held-out loss, answers and baselines; all ranks together, rank 0 returns them all."""
        found: dict[str, Any] = {"held_out_loss": self._held_out_loss()}
        if self._text is not None:
            found |= self._ask()
        for name, value in found.items():
            self.loop.say(f"{name.replace('_', ' ')}: {value:.4g}")
        return found

    def _ask(self) -> dict[str, Any]:
        answers = self._answers()
        found: dict[str, Any] = {"questions": len(answers), "exact_match": _share(answers)}
        found["majority_answer"] = majority(self.opened, answers)
        if self.recipe.evaluation.without_images:
            self.trainer.blank = True
            found["exact_match_without_images"] = _share(self._answers())
            self.trainer.blank = False
        if self.loop.rank == 0:
            self._write_answers(answers)
        return found

    def _batches(self, opened: Opened) -> tuple[RankBatches, int]:
        evaluation = self.recipe.evaluation
        data = dataclasses.replace(self.recipe.data, sequences=0)
        side = self._side(data, 1)
        stream = held_out_stream(opened, evaluation.batch)
        total = sum(len(each) for each in opened.prepared)
        return RankBatches(stream, opened.sources, side), min(evaluation.samples or total, total)

    def _side(self, data: DataPart, micro_batches: int) -> Side:
        return side_of(
            self.trainer, data, self._padding, self.readers, self._share, micro_batches
        )

    def _held_out_loss(self) -> float:
        """Mean over the counted tokens of whole batches, and of the tail filled up."""
        batches, count = self._batches(self._held_out)
        sums = torch.zeros(2, dtype=torch.float64)
        for start in range(0, count, self.recipe.evaluation.batch):
            self.loop.stop_if_told(self.recipe.training.steps)
            batch = batches.at(start)
            sums += torch.tensor(
                self.trainer.held_out_loss(batch.only(count - start)), dtype=torch.float64
            )
        return (sums[0] / sums[1].clamp(min=1)).item()

    def _answers(self) -> list[Answer]:
        evaluation, opened = self.recipe.evaluation, self._questions
        batches, count = self._batches(opened)
        greedy = Greedy(self.trainer, self.encoder, batches, evaluation.answer_tokens)
        said: list[str] = []
        for start in range(0, count, evaluation.batch):
            self.loop.stop_if_told(self.recipe.training.steps)
            tokens = greedy.answers(start)
            said += self.encoder.tokenizer.batch_decode(tokens)
        asked = (
            wanted(source[number])
            for source, prepared in zip(opened.sources, opened.prepared, strict=True)
            if source is not None
            for number in prepared.numbers.tolist()
        )
        # What is not asked is not read either.
        pairs = itertools.islice(asked, count)
        return [Answer(*pair, text) for pair, text in zip(pairs, said, strict=False)]

    def _write_answers(self, answers: list[Answer]) -> None:
        rows = [dataclasses.asdict(each) for each in answers]
        write_summary(Path(self.recipe.run.out) / "answers.json", {"answers": rows})


def _share(answers: list[Answer]) -> float:
    return sum(each.right for each in answers) / max(len(answers), 1)


def run_recipe(
    recipe: Recipe, backend: str, requests: StopRequests, *, fresh: bool
) -> None:
    """Run a recipe on this rank.

    Args:
        recipe: what to run.
        backend: of the process groups.
        requests: what tells this rank to stop.
        fresh: start anew instead of resuming.

    Raises:
        JobError: what cannot go on, the same on every rank where all of them see it.
        Stopped: it was told to stop, and has saved.
    """
    folder = model_folder(recipe)
    with contextlib.ExitStack() as stack:
        readers = readers_of(recipe, folder, stack)  # processes are forked before groups are made
        with connection_notes.held_back():
            init_distributed(backend, recipe.run.timeout)
        try:
            with models.one_sentence():
                RecipeJob(recipe, folder, readers, requests, fresh=fresh).run()
        except (SourceError, TemplateError) as error:
            raise JobError(str(error)) from error
    sys.stdout.flush()


def model_folder(recipe: Recipe) -> Path:
    """Return the model's folder, which is made first if the recipe says so.

    Raises:
        JobError: it cannot be made.
    """
    if not recipe.model.make:
        return Path(recipe.model.folder).expanduser()
    place = Path(recipe.run.out) / "model"
    return make_model(recipe.model.make, recipe.model.settings, place, recipe.run.timeout)
