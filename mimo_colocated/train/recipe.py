# SPDX-License-Identifier: Apache-2.0
"""The fields of a recipe; docs/training.md shows one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mimo_colocated.launch.errors import JobError
from mimo_colocated.launch.layouts import LANGUAGE, Layout
from mimo_colocated.train import checks

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ModelPart:
    """The model that is trained.

    Attributes:
        folder: Hugging Face folder, with its tokenizer, chat template and processor. Empty where
            ``make`` says what to make in ``OUT/model``.
        make: a model that is written first, as such a folder: ``easy-vqa``; ``text``, a language
            model alone; ``llava``, a tower and a language model that have not met.
        settings: of what is made: sizes; the folders ``images`` and ``language``, ``image_token``.
        dtype: of weights and activations.
        freeze: what does not train: ``language``, ``images``, ``images.encoder``,
            ``images.projector``.
        torch_native: modules, ``language`` or modalities, that stay transformers' own and are
            sharded by PyTorch: docs/torch-native.md.
    """

    folder: str = ""
    make: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    freeze: list[str] = field(default_factory=list)
    torch_native: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class LayoutPart:
    """Which ranks do what.

    Attributes:
        language: of the language model, such as ``tp=2,cp=2,dp=2``.
        encoders: modality -> layout, such as ``{images: "tp=2,dp=4"}``; one that is not named has
            a whole copy on every rank.
        sequence_parallel: also cut the sequence over TP.
    """

    language: str = "tp=1,dp=1"
    encoders: dict[str, str] = field(default_factory=dict)
    sequence_parallel: bool = False


@dataclass(frozen=True)
class SourcePart:
    """A data set.

    Attributes:
        kind: ``llava``, ``chat``, ``datasets``, ``webdataset``, ``energon`` or ``easy-vqa``;
            ``tokens``, which is files of uint16.
        settings: of its kind, such as ``path``.
        weight: how often each of its samples is seen in an epoch.
    """

    kind: str
    settings: dict[str, Any] = field(default_factory=dict)
    weight: float = 1.0


@dataclass(frozen=True)
class DataPart:
    """What is read, and how it becomes batches.

    Attributes:
        train: the mixture that is trained on.
        held_out: what is evaluated; its last answers are asked for.
        max_tokens: longer samples are skipped.
        skip: skip samples that cannot be used, and count them by reason; false stops instead.
        look_at_images: look at every image's file when the data is prepared.
        packed: samples of a language replica lie end to end, without padding between them.
        sequences: a global batch is as many samples as fit into so many packed sequences of
            ``capacity`` tokens; 0 for ``training.global_batch_size`` samples.
        capacity: tokens of such a sequence.
        workers: processes of each rank that opens images; 0 for a thread.
        ahead: steps whose batches are made ahead.
    """

    train: list[SourcePart]
    held_out: list[SourcePart] = field(default_factory=list)
    max_tokens: int = 2048
    skip: bool = True
    look_at_images: bool = True
    packed: bool = False
    sequences: int = 0
    capacity: int = 0
    workers: int = 0
    ahead: int = 2


@dataclass(frozen=True)
class TrainingPart:
    """How the weights are moved.

    Attributes:
        steps: training steps.
        global_batch_size: samples of a step over all ranks.
        micro_batches: of a step.
        lr: peak learning rate.
        min_lr: the last one.
        warmup_steps: until the peak; None for 20, or a tenth of the steps if that is less.
        weight_decay: of all weights.
        clip_grad: largest gradient norm, 0 for none.
        seed: of drawn weights, dropout and the order of the data.
        save_every: steps between checkpoints, 0 for none.
        max_skipped: steps in a row whose gradients may not be finite.
        recompute: ``none``, ``selective`` or ``full``, in all modules.
    """

    steps: int
    global_batch_size: int
    micro_batches: int = 1
    lr: float = 1e-3
    min_lr: float = 0.0
    warmup_steps: int | None = None
    weight_decay: float = 0.01
    clip_grad: float = 1.0
    seed: int = 1234
    save_every: int = 100
    max_skipped: int = 10
    recompute: str = "none"

    @property
    def warmup(self) -> int:
        """Steps until the peak, whether they are set or not: a short trial sets nothing."""
        return min(20, self.steps // 10) if self.warmup_steps is None else self.warmup_steps


@dataclass(frozen=True)
class EvaluationPart:
    """What is asked of the model at the end.

    Attributes:
        batch: held-out samples at once, over all ranks.
        answer_tokens: an answer is cut after so many.
        samples: of the held-out data, from its beginning; 0 for all.
        without_images: also answer with every image blank, a baseline.
    """

    batch: int = 64
    answer_tokens: int = 8
    samples: int = 0
    without_images: bool = False


@dataclass(frozen=True)
class RunPart:
    """Where it runs and what it leaves.

    Attributes:
        out: folder of checkpoints and results.
        export: write the trained model to ``OUT/exported`` as a Hugging Face folder.
        tensorboard: also write what ``metrics.jsonl`` says to ``OUT/tensorboard``.
        backend: of process groups: ``auto``, ``nccl`` or ``gloo``.
        timeout: seconds after which a rank that does not answer is lost.
    """

    out: str
    export: bool = True
    tensorboard: bool = False
    backend: str = "auto"
    timeout: int = 600


@dataclass(frozen=True)
class Recipe:
    """A whole run.

    Attributes:
        name: of the recipe.
        model: what is trained.
        data: what it reads.
        training: how.
        run: where, and what it leaves.
        layout: which ranks do what.
        evaluation: what is asked at the end.
    """

    name: str
    model: ModelPart
    data: DataPart
    training: TrainingPart
    run: RunPart
    layout: LayoutPart = field(default_factory=LayoutPart)
    evaluation: EvaluationPart = field(default_factory=EvaluationPart)

    @property
    def language(self) -> Layout:
        """Layout of the language model."""
        return Layout.parse(self.layout.language, LANGUAGE)

    @property
    def of_tokens(self) -> bool:
        """Whether the data is tokens already."""
        return any(part.kind == "tokens" for part in self.data.train)

    def encoders(self) -> dict[str, Layout]:
        """Return modality -> layout, of those that are named."""
        return {name: Layout.parse(at, name) for name, at in self.layout.encoders.items()}

    def check(self) -> None:
        """Refuse what cannot run, whatever the model.

        Raises:
            JobError: the first thing that is wrong, and what to set instead.
        """
        for wrong in self._wrong():
            raise JobError(f"recipe {self.name}: {wrong}")

    def _wrong(self) -> list[str]:
        model, data, training = self.model, self.data, self.training
        world, encoders = self.language.size, self.encoders()
        found = [
            f"layout.encoders.{name}={at} spans {at.size} ranks and layout.language="
            f"{self.language} spans {world}; both must span the same"
            for name, at in encoders.items()
            if at.size != world
        ]
        if self.language.pp > 1:
            found.append(
                f"layout.language={self.language} has pipeline stages, which recipes do not run "
                "yet; give tp, cp and dp alone"
            )
        if "language" in model.torch_native and data.packed:
            found.append(
                "model.torch_native names language, which takes no packed samples; set "
                "data.packed=false"
            )
        if bool(model.folder) is bool(model.make):
            found.append(
                f"model.folder={model.folder!r} and model.make={model.make!r}; set one of them"
            )
        if model.dtype not in DTYPES:
            found.append(f"model.dtype={model.dtype!r} is none of {', '.join(DTYPES)}")
        kinds = {part.kind == "tokens" for part in [*data.train, *data.held_out]}
        if len(kinds) > 1:
            found.append("data of kind tokens is not mixed with conversations; give one of them")
        if not data.train:
            found.append("data.train names no data; give at least one")
        if training.recompute not in ("none", "selective", "full"):
            found.append(f"training.recompute={training.recompute!r} is none, selective or full")
        lows = [each for each in self._lows() if each[1] < each[2]]
        found += [f"{name}={value}; it must be at least {low}" for name, value, low in lows]
        return found or list(checks.problems(self))

    def _lows(self) -> list[tuple[str, float, float]]:
        data, training, evaluation = self.data, self.training, self.evaluation
        return [
            ("training.steps", training.steps, 1),
            ("training.global_batch_size", training.global_batch_size, 1),
            ("training.micro_batches", training.micro_batches, 1),
            ("training.lr", training.lr, 0),
            ("training.min_lr", training.min_lr, 0),
            ("training.warmup_steps", training.warmup, 0),
            ("training.weight_decay", training.weight_decay, 0),
            ("training.clip_grad", training.clip_grad, 0),
            ("training.save_every", training.save_every, 0),
            ("training.max_skipped", training.max_skipped, 1),
            ("training.seed", training.seed, 0),
            ("data.max_tokens", data.max_tokens, 2),
            ("data.workers", data.workers, 0),
            ("data.ahead", data.ahead, 0),
            ("data.sequences", data.sequences, 0),
            ("evaluation.batch", evaluation.batch, 1),
            ("evaluation.answer_tokens", evaluation.answer_tokens, 1),
            ("evaluation.samples", evaluation.samples, 0),
            ("run.timeout", self.run.timeout, 1),
        ]
