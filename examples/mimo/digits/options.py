# SPDX-License-Identifier: Apache-2.0
"""All options of the job: one frozen dataclass, parsed by argparse.

Everything is checked before a process is started or a file is touched; what does not fit is said
in one sentence (:class:`JobError`).
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layouts import Layout, Limits, Pair, check_layouts

from mimo_colocated.launch.errors import JobError
from mimo_colocated.launch.options import option, parse, real, share, switch, whole

HEADS = 8
SEQUENCE_LENGTH = 32
# What --freeze may name; the lower encoder is its embeddings and the lower half of its layers. The
# first three are those of every modality, the last four of one.
FREEZABLE = (
    "encoder",
    "lower-encoder",
    "projector",
    "language",
    "vision-encoder",
    "vision-projector",
    "audio-encoder",
    "audio-projector",
)


def parts_to_freeze(text: str) -> tuple[str, ...]:
    """Parts of the model that ``--freeze`` names, such as ``"encoder+projector"``.

    Raises:
        argparse.ArgumentTypeError: an unknown part, or nothing is left to train.
    """
    parts = tuple(part for part in text.split("+") if part)
    for part in parts:
        if part not in FREEZABLE:
            raise argparse.ArgumentTypeError(
                f"must be parts of {', '.join(FREEZABLE)}, joined by '+', got {text!r}"
            )
    if {"encoder", "projector", "language"} <= set(parts):
        raise argparse.ArgumentTypeError(f"must leave something to train, got {text!r}")
    return parts


def frozen_parts(text: str) -> set[str]:
    """The same with each modality's part by its own name.

    >>> sorted(frozen_parts("encoder+language"))
    ['audio-encoder', 'language', 'vision-encoder']
    """
    parts = parts_to_freeze(text)
    both = {"encoder", "projector"} & set(parts)
    return {f"{side}-{part}" for side in ("vision", "audio") for part in both} | set(parts) - both


def _check_freeze(options: Options) -> None:
    """What is frozen of one modality: it must be there, and something must be left to train.

    Raises:
        JobError: one of both is not so.
    """
    for part in parts_to_freeze(options.freeze):
        if part.startswith("audio-") and options.audio is None:
            raise JobError(f"--freeze {part} is for a run with sounds; add --audio tp=1,dp=8")
    whole = {"language"} | {
        f"{side}-{part}" for side in options.pair.encoders for part in ("encoder", "projector")
    }
    if whole <= frozen_parts(options.freeze):
        raise JobError(f"--freeze: must leave something to train, got {options.freeze!r}")


def _freeze(text: str) -> str:
    return "+".join(parts_to_freeze(text))


def _vision(text: str) -> Layout:
    return Layout.parse(text, "vision")


def _audio(text: str) -> Layout:
    return Layout.parse(text, "audio")


def _language(text: str) -> Layout:
    return Layout.parse(text, "language")


@dataclass(frozen=True)
class Options:
    """What the user asked for; the defaults are what ``make train`` runs."""

    vision: Layout = option(
        Layout(tp=2, dp=4), "layout of the vision encoder, such as tp=2,dp=4", _vision
    )
    audio: Layout | None = option(
        None, "layout of an audio encoder, such as tp=1,dp=8: samples then show digits as images, "
        "as sounds, as a mix of both or as text; without it there are images only", _audio,
    )  # fmt: skip
    language: Layout = option(
        Layout(tp=2, cp=2, dp=2), "layout of the language model, such as tp=2,cp=2,dp=2", _language
    )
    steps: int = option(600, "training steps", whole(1))
    seed: int = option(1234, "of the initial weights and of the order of the images", whole(0))
    global_batch_size: int = option(32, "samples per step over all ranks", whole(1))
    micro_batches: int = option(1, "microbatches per step", whole(1))
    encode_ahead: int | None = option(
        None, "microbatches that are encoded together, with a pipelined language model (pp > 1); "
        "all of a step by default", whole(1),
    )  # fmt: skip
    language_layers: int = option(2, "layers of the language model", whole(1))
    virtual_stages: int = option(
        1, "stages per rank of a pipelined language model, which then interleaves", whole(1)
    )
    eval_batch_size: int = option(32, "samples per held-out batch", whole(1))
    lr: float = option(1.5e-3, "peak learning rate", real(0.0, low_included=False))
    clip_grad: float = option(
        1.0, "largest gradient norm, 0 for none", real(0.0, low_included=True)
    )
    max_skipped: int = option(
        10, "steps in a row that may be skipped because of gradients that are not finite; the job "
        "stops then. Those in which float16 looks for its loss scale do not count", whole(1),
    )  # fmt: skip
    sequence_parallel: bool = switch(False, "also cut the language sequence over TP")
    packed: bool = switch(
        False, "pack each language replica's samples into one sequence, each cut at its end"
    )
    varied_samples: bool = switch(False, "samples show one to four digits instead of four")
    experts: int = option(
        0, "experts in place of each MLP of the language model, 0 for none; its layout may have "
        "ep (ranks that share them out) and etp (ranks for each, tp by default)", whole(0),
    )  # fmt: skip
    bridge: str = option(
        "routed", "how image rows reach the language model: each to the ranks that own its "
        "position (routed), or all to every rank of a replica (gather)", str, "gather", "routed",
    )  # fmt: skip
    distributed_optimizer: bool = switch(True, "shard the optimizer's state over DP")
    overlap_grad_reduce: bool = switch(True, "reduce gradients while backward still runs")
    overlap_param_gather: bool = switch(
        True, "gather updated weights while forward runs; without a distributed optimizer every "
        "rank has them",
    )  # fmt: skip
    freeze: str = option(
        "", f"what does not train, such as encoder+projector: any of {', '.join(FREEZABLE)}; may "
        "change when the run resumes", _freeze,
    )  # fmt: skip
    uneven_loss_mask: bool = switch(False, "count only some of each sample's answer digits")
    dtype: str = option(
        "float32", "of the weights and activations; gradients are summed in float32", str,
        "float32", "bfloat16", "float16",
    )  # fmt: skip
    dropout: float = option(0.0, "probability, in both modules", share)
    recompute: str = option(
        "none", "what is computed again in backward instead of kept: nothing, attention "
        "(selective) or whole layers (full), in both modules", str, "none", "selective", "full",
    )  # fmt: skip
    encoder_memory: str = option(
        "keep", "what becomes of the encoder's activations while the language model runs: they "
        "stay (keep), are computed again (recompute), or wait in host memory (offload)", str,
        "keep", "recompute", "offload",
    )  # fmt: skip
    projector_memory: str = option(
        "keep", "the same of the encoder's output and the projector's activations", str,
        "keep", "recompute", "offload",
    )  # fmt: skip
    memory_plan: bool = switch(
        False, "print what each way to hold the encoder's activations would save, and end"
    )
    backend: str = option(
        "auto", "of the process groups; auto is nccl with enough GPUs, else gloo", str,
        "auto", "nccl", "gloo",
    )  # fmt: skip
    timeout: int = option(60, "seconds after which a rank that does not answer is lost", whole(1))
    nproc: int | None = option(
        None, "processes to start; the layouts decide by default", whole(1)
    )
    out: Path = option(Path("runs/digits"), "folder for checkpoints and results", Path)
    save_every: int = option(50, "steps between checkpoints, 0 for none", whole(0))
    background_saves: bool = switch(
        True, "go on training while a checkpoint's files are written, from a copy in host memory"
    )
    checkpoint_digests: bool = switch(True, "compare digests of the checkpoint's files on resume")
    fresh: bool = switch(False, "start anew instead of resuming from the last checkpoint")
    evaluate: bool = switch(True, "read the held-out images at the end")

    @property
    def pair(self) -> Pair:
        """All layouts."""
        return Pair(self.vision, self.language, self.audio)

    @property
    def world_size(self) -> int:
        """Ranks that the layouts span (the same for all, once checked)."""
        return self.vision.size

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for ``summary.json``."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {key: str(v) if isinstance(v, (Layout, Path)) else v for key, v in plain.items()}


def _check_pipeline(options: Options) -> None:
    """What a pipelined language model needs besides a layout that fits.

    Raises:
        JobError: the first thing that is missing.
    """
    stages, virtual = options.language.pp, options.virtual_stages
    if stages > 1 and options.bridge == "gather" and options.experts:
        raise JobError(
            f"--experts {options.experts} with --language pp={stages} needs --bridge routed, got "
            "gather, which wants the ranks of a replica next to each other, stages and all"
        )
    wanted = {"--virtual-stages": virtual > 1, "--encode-ahead": options.encode_ahead is not None}
    for flag, given in wanted.items():
        if given and stages == 1:
            raise JobError(f"{flag} is for a pipelined language model; add pp=2 to --language")
    if virtual > 1 and options.micro_batches % stages:
        raise JobError(
            f"--virtual-stages {virtual} interleaves groups of {stages} microbatches, got "
            f"--micro-batches {options.micro_batches}; use a multiple of {stages}"
        )
    if virtual > 1 and (options.encode_ahead or options.micro_batches) < options.micro_batches:
        raise JobError(
            f"--encode-ahead {options.encode_ahead} needs --virtual-stages 1, got {virtual}: with "
            "virtual stages all microbatches of a step are encoded together"
        )


def _check_varied(options: Options) -> None:
    """What samples of different lengths need.

    Raises:
        JobError: the first thing that does not fit.
    """
    if not options.varied_samples:
        return
    if options.bridge == "gather":
        raise JobError(
            "--varied-samples needs --bridge routed, got gather, which moves equally many image "
            "rows for every replica"
        )
    if options.packed and options.virtual_stages > 1 and options.language.pp == 2:
        raise JobError(
            f"--varied-samples with --packed and --virtual-stages {options.virtual_stages} needs "
            "more than two pipeline stages: two that interleave cannot tell each other lengths "
            "that differ; leave one of these out"
        )


def _check_bridge(options: Options) -> None:
    """The gather bridge beside an audio encoder.

    Raises:
        JobError: DP sizes differ.
    """
    sizes = {name: layout.dp for name, layout in options.pair.encoders.items()}
    sizes["language"] = options.language.dp
    if options.audio and options.bridge == "gather" and len(set(sizes.values())) > 1:
        said = ", ".join(f"{name} dp={size}" for name, size in sizes.items())
        raise JobError(
            "--bridge gather wants equally many rows of every sample where DP sizes differ, and "
            f"with --audio some samples have no image or no sound; got {said}; use --bridge "
            "routed, or one DP size for all"
        )


def parse_options(
    argv: Sequence[str],
    world_size: int | None = None,
    *,
    sequence_length: int = SEQUENCE_LENGTH,
    vision_heads: int = HEADS,
    audio_heads: int = HEADS,
    language_heads: int = HEADS,
) -> Options:
    """Read and check the command line.

    Args:
        argv: the arguments after the script's name.
        world_size: ranks already started (torchrun), or None when the layouts decide.
        sequence_length: tokens per sample.
        vision_heads: attention heads that the vision encoder's TP must divide.
        audio_heads, language_heads: the same of the audio encoder and of the language model.

    Raises:
        JobError: for a wrong option, and for layouts and batch sizes that do not fit, with a pair
            of layouts that would.
        SystemExit: after ``--help``.
    """
    options = parse(
        Options,
        argv,
        prog="train.py",
        description="Train a model to read handwritten digits, and spoken ones, on any layout.",
        metavars=dict.fromkeys(("vision", "audio", "language"), "AXIS=SIZE,..."),
    )
    limits = Limits(
        global_batch_size=options.global_batch_size,
        micro_batches=options.micro_batches,
        eval_batch_size=options.eval_batch_size,
        sequence_parallel=options.sequence_parallel,
        world_size=options.nproc if world_size is None else world_size,
        sequence_length=sequence_length,
        vision_heads=vision_heads,
        audio_heads=audio_heads,
        language_heads=language_heads,
        experts=options.experts,
        language_layers=options.language_layers,
        virtual_stages=options.virtual_stages,
    )
    check_layouts(options.pair, limits)
    _check_pipeline(options)
    _check_varied(options)
    _check_bridge(options)
    _check_freeze(options)
    if world_size is not None and options.nproc not in (None, world_size):
        raise JobError(
            f"--nproc {options.nproc} was given, but {world_size} ranks were started; leave it out"
        )
    return options
