# SPDX-License-Identifier: Apache-2.0
"""The fields of a recipe; docs/training.md shows one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mimo_colocated.launch.errors import JobError
from mimo_colocated.launch.layouts import LANGUAGE, Layout
from mimo_colocated.launch.lora import Lora
from mimo_colocated.launch.parameter_groups import ParameterGroup
from mimo_colocated.train import checks

DTYPES = ("float32", "bfloat16", "float16")
BACKENDS = ("auto", "nccl", "gloo")


@dataclass(frozen=True)
class ModelPart:
    """The model that is trained.

    Attributes:
        folder: Hugging Face folder, with its tokenizer, chat template and processor. Empty where
            ``make`` says what to make in ``OUT/model``.
        make: a model that is written first, as such a folder: ``easy-vqa``; ``text``, a language
            model alone; ``llava``, a tower and a language model that have not met.
        from_run: a run whose last checkpoint has the weights to begin with, instead of a folder;
            its optimizer and its schedule stay behind.
        settings: of what is made: sizes; the folders ``images`` and ``language``, ``image_token``.
        dtype: of weights and activations.
        freeze: what does not train: ``language``, ``images``, ``images.encoder``,
            ``images.projector``, names of parameters or patterns: docs/training.md.
        torch_native: modules, ``language`` or modalities, that stay transformers' own and are
            sharded by PyTorch: docs/torch-native.md.
        lora: adapters of linear layers, which then train alone.
    """

    folder: str = ""
    make: str = ""
    from_run: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    freeze: list[str] = field(default_factory=list)
    torch_native: list[str] = field(default_factory=list)
    lora: Lora = field(default_factory=Lora)


@dataclass(frozen=True)
class LayoutPart:
    """Which ranks do what.

    Attributes:
        language: of the language model, such as ``tp=2,cp=2,dp=2`` or ``tp=2,pp=2,dp=2``.
        encoders: modality -> layout, such as ``{images: "tp=2,dp=4"}``; one that is not named has
            a whole copy on every rank. ``cp`` above 1 cuts each image over ranks, of CLIP's,
            SigLIP's and SigLIP2's towers.
        sequence_parallel: also cut the sequence over TP.
        virtual_stages: stages per rank of a pipelined language model (``pp`` above 1), which then
            interleaves.
    """

    language: str = "tp=1,dp=1"
    encoders: dict[str, str] = field(default_factory=dict)
    sequence_parallel: bool = False
    virtual_stages: int = 1


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
        look_at_images: look at every image's and sound's file when the data is prepared.
        packed: samples of a language replica lie end to end, without padding between them.
        sequences: a global batch is as many samples as fit into so many packed sequences of
            ``capacity`` tokens; 0 for ``training.global_batch_size`` samples.
        capacity: tokens of such a sequence.
        workers: processes per rank that open images and sounds; 0 for a thread.
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
        encode_ahead: microbatches that are encoded together, with a pipelined language model, None
            for all of a step; without stages those that are encoded and sent off before the
            language model needs them, None for none.
        encode_in_bubbles: with a pipelined language model, how many of a step's last microbatches
            are encoded while a stage waits for the others.
        lr: peak learning rate.
        min_lr: the last one.
        warmup_steps: until the peak; None for 20, or a tenth of the steps if that is less.
        weight_decay: of all weights.
        clip_grad: largest gradient norm, 0 for none.
        seed: of drawn weights, dropout and the order of the data.
        save_every: steps between checkpoints, 0 for none.
        max_skipped: steps in a row whose gradients may not be finite.
        recompute: ``none``, ``selective`` or ``full``, in all modules.
        groups: other learning rates or weight decay for some parameters; of several that name one
            the last counts.
    """

    steps: int
    global_batch_size: int
    micro_batches: int = 1
    encode_ahead: int | None = None
    encode_in_bubbles: int = 0
    lr: float = 1e-3
    min_lr: float = 0.0
    warmup_steps: int | None = None
    weight_decay: float = 0.01
    clip_grad: float = 1.0
    seed: int = 1234
    save_every: int = 100
    max_skipped: int = 10
    recompute: str = "none"
    groups: list[ParameterGroup] = field(default_factory=list)

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
        without_images: also answer with every image or sound blank, a baseline.
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
        wandb: project of Weights & Biases that they are logged to, too; empty for none.
        backend: of process groups: ``auto``, ``nccl`` or ``gloo``.
        timeout: seconds after which a rank that does not answer is lost.
    """

    out: str
    export: bool = True
    tensorboard: bool = False
    wandb: str = ""
    backend: str = "auto"
    timeout: int = 600


@dataclass(frozen=True)
class LinkPart:
    """Links that lose packets: docs/lossy.md says what each field means.

    Attributes:
        layers: pattern of the names of layers and bridges, such as ``language_model.*``.
        loss: a preset's name, ``{rate}``, ``{p_gb, p_bg}`` or ``{loss, burst}``, each with the
            further fields of its model.
        directions: ``forward``, ``backward``.
        collectives: ``sum``, ``gather``, ``reduce_scatter``, ``exchange``, ``gradients``.
        replacement: ``zero``, ``stale``, ``rescaled`` or ``retransmitted``.
        side: ``sender`` or ``receiver``.
        payload: bytes per packet.
        common_mode: all senders of a place lose the same packets.
    """

    loss: str | dict[str, Any]
    layers: str = "*"
    directions: list[str] = field(default_factory=lambda: ["forward", "backward"])
    collectives: list[str] = field(
        default_factory=lambda: ["sum", "gather", "reduce_scatter", "exchange"]
    )
    replacement: str = "zero"
    side: str = "sender"
    payload: int = 1450
    common_mode: bool = False


@dataclass(frozen=True)
class SpeedPart:
    """A stated link, for the time that a step would need; nothing is measured.

    Attributes:
        bits_per_second: that a rank can send.
        round_trip_s: until a sender knows what was lost.
        header_bytes: of each packet beside its payload.
    """

    bits_per_second: float = 10e9
    round_trip_s: float = 50e-6
    header_bytes: int = 50


@dataclass(frozen=True)
class LossyPart:
    """Links that lose packets; also the content of a file for ``--lossy``.

    Attributes:
        rules: the first that fits a place holds; without any, nothing is lost.
        seed: of what is lost.
        evaluation: ``lossless``, or ``lossy`` as the training is.
        speed: of the links.
    """

    rules: list[LinkPart] = field(default_factory=list)
    seed: int = 1
    evaluation: str = "lossless"
    speed: SpeedPart = field(default_factory=SpeedPart)


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
        lossy: links that lose packets; none by default.
    """

    name: str
    model: ModelPart
    data: DataPart
    training: TrainingPart
    run: RunPart
    layout: LayoutPart = field(default_factory=LayoutPart)
    evaluation: EvaluationPart = field(default_factory=EvaluationPart)
    lossy: LossyPart = field(default_factory=LossyPart)

    @property
    def language(self) -> Layout:
        """Layout of the language model."""
        return Layout.parse(self.layout.language, LANGUAGE)

    @property
    def of_tokens(self) -> bool:
        """Whether the data is tokens already."""
        return any(part.kind == "tokens" for part in [*self.data.train, *self.data.held_out])

    @property
    def lengths_differ(self) -> bool:
        """Whether microbatches of a step may be of several lengths."""
        if not self.of_tokens or self.data.packed:
            return True
        parts = [*self.data.train, *self.data.held_out]
        return len({part.settings.get("length") for part in parts}) > 1

    @property
    def longest(self) -> int:
        """Tokens of the longest sample that is trained on; its last label is not among them."""
        if not self.of_tokens:
            return self.data.max_tokens
        lengths = [part.settings.get("length") for part in self.data.train]
        return max((each for each in lengths if isinstance(each, int)), default=0)

    @property
    def held_out_micro_batches(self) -> int:
        """Microbatches of a batch of held-out data: stages that interleave want one each."""
        return self.language.pp if self.layout.virtual_stages > 1 else 1

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
        if "language" in model.torch_native and data.packed:
            found.append(
                "model.torch_native names language, which takes no packed samples; set "
                "data.packed=false"
            )
        where = {name: getattr(model, name) for name in ("folder", "make", "from_run")}
        if sum(map(bool, where.values())) != 1:
            said = " and ".join(f"model.{name}={value!r}" for name, value in where.items())
            found.append(f"{said}; set one of them")
        texts = {"name": self.name, "run.out": self.run.out}
        found += [f"{name} is empty; give one" for name, text in texts.items() if not text]
        if self.run.backend not in BACKENDS:
            found.append(f"run.backend={self.run.backend!r} is none of {', '.join(BACKENDS)}")
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
        ahead = training.encode_ahead
        return [
            ("training.steps", training.steps, 1),
            ("training.global_batch_size", training.global_batch_size, 1),
            ("training.micro_batches", training.micro_batches, 1),
            ("training.encode_ahead", 1 if ahead is None else ahead, 1),
            ("training.encode_in_bubbles", training.encode_in_bubbles, 0),
            ("layout.virtual_stages", self.layout.virtual_stages, 1),
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
            ("lossy.seed", self.lossy.seed, 0),
        ]
