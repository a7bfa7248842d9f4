# SPDX-License-Identifier: Apache-2.0
"""One rank of a recipe: build, resume or start anew, train, export, evaluate."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from megatron.core.models.mimo.checkpoint.history import History
from megatron.core.models.mimo.checkpoint.store import Manifest
from megatron.core.models.mimo.data.encoding import ChatEncoder, TemplateError
from megatron.core.models.mimo.data.loader import RankBatches, Side
from megatron.core.models.mimo.data.readers import Reader
from megatron.core.models.mimo.data.sources import SourceError
from megatron.core.models.mimo.huggingface.all_ranks import on_all_ranks
from megatron.core.models.mimo.huggingface.build import BuildOptions, from_folder
from megatron.core.models.mimo.huggingface.export import to_folder
from megatron.core.models.mimo.huggingface.lora_export import merged, to_adapter_folder
from megatron.core.models.mimo.job.reporter import Reporter, versions
from megatron.core.models.mimo.job.results import read_metrics, write_summary
from megatron.core.models.mimo.job.trainer import TrainOptions
from megatron.core.models.mimo.training.agreement import gathered
from megatron.core.models.mimo.training.parameter_names import (
    ParameterNameError,
    adapted_modules,
    frozen_parts,
)
from mimo_colocated.cli import models
from mimo_colocated.cli.importing import RECORD, source_of
from mimo_colocated.launch import JobError, connection_notes, init_distributed
from mimo_colocated.launch.lora import Lora
from mimo_colocated.launch.training_options import TrainingOptions
from mimo_colocated.stop_requests import StopRequests
from mimo_colocated.train.answers import majority, stop_at
from mimo_colocated.train.boards import Board, boards_of
from mimo_colocated.train.data import (
    Opened,
    StepData,
    open_data,
    side_of,
    training_stream,
)
from mimo_colocated.train.evaluation import Evaluation, open_held_out
from mimo_colocated.train.items import readers_of, shared_reads
from mimo_colocated.train.makers import model_folder
from mimo_colocated.train.numbers import StepNumbers, peak_memory
from mimo_colocated.train.plan import check_model
from mimo_colocated.train.profile_steps import Profile
from mimo_colocated.train.reading import as_yaml
from mimo_colocated.train.recipe import DataPart, LossyPart, Recipe
from mimo_colocated.train.record import write_record
from mimo_colocated.train.reporting import RecipeReporter
from mimo_colocated.train.stages import Stage
from mimo_colocated.train.traced_loop import TracedLoop
from mimo_colocated.train.trainer import RecipeTrainer

if TYPE_CHECKING:
    from mimo_colocated.train.lossy import SavedLinks

# Fields of a recipe that may not change in mid-run: it would train on other data than recorded.
_FIXED = (
    *(f"model.{name}" for name in ("folder", "make", "from_run", "settings", "dtype", "lora")),
    *(f"data.{name}" for name in ("train", "max_tokens", "sequences", "capacity")),
    *(f"training.{name}" for name in ("steps", "global_batch_size", "lr", "min_lr")),
    *(f"training.{name}" for name in ("warmup_steps", "weight_decay", "seed", "groups")),
    *(f"lossy.{name}" for name in ("rules", "seed")),
)
_LOSSLESS = dataclasses.asdict(LossyPart())
# What fields were before there were any.
_BEFORE: dict[str, Any] = {
    **{f"lossy.{name}": _LOSSLESS[name] for name in ("rules", "seed")},
    "model.from_run": "",
    "model.lora": dataclasses.asdict(Lora()),
    "training.groups": [],
}


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
            encode_ahead=training.encode_ahead,
            encode_in_bubbles=training.encode_in_bubbles,
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


class RecipeLoop(TracedLoop):
    """From the last checkpoint to the last step, over a recipe's data.

    Args:
        options: of the recipe.
        trainer: makes the steps.
        data: what the trainer steps over.
        requests: what tells this rank to stop.
        opened: what is trained on.
        profile: steps to record.
    """

    links: SavedLinks | None = None
    results = (
        *TracedLoop.results, "links.json", "exported", "adapter", "evaluation", "wandb",
    )  # fmt: skip

    def __init__(
        self,
        options: RunOptions,
        trainer: RecipeTrainer,
        data: StepData,
        requests: StopRequests,
        opened: Opened,
        profile: Profile | None,
    ) -> None:
        super().__init__(options, trainer, data, requests, profile)
        self.opened = opened

    def start(self) -> int:
        """Resume or start anew, and record the run, unless it is refused."""
        done = super().start()
        options: Any = self.options
        found = self.found()
        told = as_yaml(options.recipe)
        on_all_ranks(lambda: write_record(options.out, told, found), "write the record")
        self._boards: list[Board] = on_all_ranks(
            lambda: [] if self.rank else boards_of(options.recipe, done), "open its boards"
        )
        built: Any = self.trainer.built
        named = built.named_parameters()
        # Of all stages; what counts the work is on rank 0 alone.
        self._frozen, self._adapted = frozen_parts(named), adapted_modules(named)
        return done

    def found(self) -> dict[str, Any]:
        """Return what the record and the summary tell: layouts, and what was skipped."""
        return {"layouts": self.trainer.built.layouts(), "skipped": self.opened.skipped()}

    def _reporter(self, done: int, sequence_length: int) -> Reporter:
        options: Any = self.options
        model = options.recipe.model
        built: Any = self.trainer.built
        numbers = StepNumbers.of_model(
            built.composite, options.language, self._frozen, model.dtype, self._adapted
        )
        return RecipeReporter(
            options.out, done, self.trainer, self.data, numbers, boards=self._boards
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
        if self.links is not None and not self.store.same_layout(manifest):
            self.links.start_anew(manifest.step)
            self.say("lossy links start anew in this layout")
        self.data.position = manifest.extra["position"]

    def check_options(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        """Refuse to go on with other data or another schedule than the run had.

        Raises:
            JobError: the first field that changed, and what to do.
        """
        for name in _FIXED:
            section, field = name.split(".")
            was = before["recipe"].get(section, {}).get(field, _BEFORE.get(name))
            new = now["recipe"][section][field]
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
        profile: steps to record.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        readers: dict[str, Reader],
        requests: StopRequests,
        *,
        fresh: bool,
        profile: Profile | None,
    ) -> None:
        self.recipe, self.folder, self.readers = recipe, folder, readers
        data, training = recipe.data, recipe.training
        # What an interrupted save left is no checkpoint to go on from.
        self._begins = fresh or not History(Path(recipe.run.out) / "checkpoints", 1).steps()
        self._text = None if recipe.of_tokens else self._text_of(folder)
        text, place = self._text or self._vocabulary(), Path(recipe.run.out) / "prepared"
        self.opened = open_data(data.train, data, text, place, 0, self._begins)
        # What is wrong with it is not to be found when all is trained.
        self._held_out, self._questions = open_held_out(recipe, text, place, retry=self._begins)
        layouts = on_all_ranks(lambda: check_model(recipe, folder), "read the model")
        with _named("model.freeze: "):
            built = from_folder(folder, layouts, self._build_options())
        options = RunOptions.of(recipe, fresh=fresh)
        steps = dataclasses.replace(
            TrainOptions.of(options),
            min_lr=training.min_lr,
            warmup_steps=training.warmup,
            weight_decay=training.weight_decay,
            groups=training.groups,
        )
        with _named("training."):
            self.trainer = RecipeTrainer(built, steps, distributed_optimizer=True)
        stream = training_stream(
            self.opened, data, training.seed, training.global_batch_size
        )
        self._share = shared_reads(built)
        side = self._side(data, training.micro_batches)
        batches = RankBatches(stream, self.opened.sources, side)
        self.data = StepData(batches, training.steps, data.ahead)
        self.loop = RecipeLoop(options, self.trainer, self.data, requests, self.opened, profile)
        self.links = self._lossy_links()

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
            "peak_memory_by_rank": gathered(peak_memory()),
        }
        if self.links is not None:
            summary["lossy"] = self._write_links(self.links)
        if self.recipe.run.export:
            self._export(out)
            if self._text is not None and self.loop.rank == 0:
                stop_at(out / "exported", self._text.end)
            self.loop.say(f"wrote {out / 'exported'}, a Hugging Face folder")
        if self.recipe.data.held_out:
            summary["held_out_skipped"] = self._held_out.skipped()
            summary["questions_skipped"] = self._questions.skipped()
            with self._links_of_evaluation():
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

    def _export(self, out: Path) -> None:
        built: Any = self.trainer.built
        if built.lora:
            to_adapter_folder(built, out / "adapter", overwrite=True)
            self.loop.say(f"wrote {out / 'adapter'}, adapters for peft")
        with merged(built):
            to_folder(built, out / "exported", overwrite=True)

    # ---- parts ----------------------------------------------------------------------------

    def _text_of(self, folder: Path) -> ChatEncoder:
        longest = self.recipe.data.max_tokens
        return on_all_ranks(lambda: ChatEncoder(folder, longest), "open its text")

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
            virtual_stages=recipe.layout.virtual_stages,
            lengths_differ=recipe.lengths_differ,
            packed=recipe.data.packed,
            recompute=recipe.training.recompute,
            seed=recipe.training.seed,
            freeze_names=recipe.model.freeze,
            lora=recipe.model.lora,
            # A run that goes on has weights of its own.
            weights=Stage.of(recipe).weights() if recipe.model.from_run and self._begins else None,
            torch_native=recipe.model.torch_native,
        )

    def _say_data(self) -> None:
        for name, opened in (
            ("training data", self.opened),
            ("held-out data", self._held_out),
            ("questions", self._questions),
        ):
            if opened.prepared:
                self.loop.say(f"{name}: {opened.summary()}")

    # ---- links that lose packets ----------------------------------------------------------

    def _lossy_links(self) -> SavedLinks | None:
        """Install them, saved along with the run; nothing is imported without."""
        part = self.recipe.lossy
        if not part.rules:
            return None
        from mimo_colocated.train import lossy

        saved = lossy.install(part, self.trainer.model)
        self.loop.links = self.loop.store.rank_state = saved
        self.loop.say(lossy.sentence(saved.links, part.evaluation))
        return saved

    def _links_of_evaluation(self) -> contextlib.AbstractContextManager[None]:
        if self.links is None or self.recipe.lossy.evaluation == "lossy":
            return contextlib.nullcontext()
        return self.links.links.lossless()

    def _write_links(self, links: SavedLinks) -> dict[str, Any]:
        from mimo_colocated.train import lossy

        out, recipe = Path(self.recipe.run.out), self.recipe
        return lossy.write_counts(out / "links.json", links, recipe.training.steps, recipe.lossy)

    # ---- evaluation -----------------------------------------------------------------------

    def _side(self, data: DataPart, micro_batches: int) -> Side:
        return side_of(
            self.trainer, data, self._padding, self.readers, self._share, micro_batches
        )

    def _evaluate(self) -> dict[str, Any]:
        """Held-out loss, answers and baselines; all ranks together, rank 0 returns them all."""
        recipe = self.recipe
        evaluation = Evaluation(
            self.trainer,
            recipe.data,
            recipe.evaluation,
            self._text,
            self._side,
            loss_micro_batches=recipe.held_out_micro_batches,
            between=lambda: self.loop.stop_if_told(recipe.training.steps),
        )
        found, answers = evaluation.measure(self._held_out, self._questions)
        if self._text is not None:
            found["majority_answer"] = majority(self.opened, answers)
            if self.loop.rank == 0:
                rows = [dataclasses.asdict(each) for each in answers]
                write_summary(Path(recipe.run.out) / "answers.json", {"answers": rows})
        for name, value in found.items():
            self.loop.say(f"{name.replace('_', ' ')}: {value:.4g}")
        return found


@contextlib.contextmanager
def _named(field: str) -> Iterator[None]:
    """Say of names of parameters that are wrong which field of the recipe has them."""
    try:
        yield
    except ParameterNameError as error:
        raise JobError(f"{field}{error}") from error


def run_recipe(
    recipe: Recipe,
    backend: str,
    requests: StopRequests,
    *,
    fresh: bool,
    profile: Profile | None,
) -> None:
    """Run a recipe on this rank.

    Args:
        recipe: what to run.
        backend: of the process groups.
        requests: what tells this rank to stop.
        fresh: start anew instead of resuming.
        profile: steps to record.

    Raises:
        JobError: what cannot go on, the same on every rank where all of them see it.
        Stopped: it was told to stop, and has saved.
    """
    folder = model_folder(recipe)
    with contextlib.ExitStack() as stack:
        # Processes are forked before groups are made.
        readers = readers_of(folder, stack, recipe.data.workers, recipe.encoders())
        with connection_notes.held_back():
            init_distributed(backend, recipe.run.timeout)
        try:
            with models.one_sentence():
                RecipeJob(recipe, folder, readers, requests, fresh=fresh, profile=profile).run()
        except (SourceError, TemplateError) as error:
            raise JobError(str(error)) from error
    sys.stdout.flush()
