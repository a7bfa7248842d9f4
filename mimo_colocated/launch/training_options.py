# SPDX-License-Identifier: Apache-2.0
"""Options that every colocated training job has; a job adds its own in a subclass.

Everything is checked before a process is started or a file is touched; what does not fit is said
in one sentence (:class:`JobError`).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mimo_colocated.launch.errors import JobError
from mimo_colocated.launch.layouts import LANGUAGE, Layout, Layouts, Limits, check_layouts
from mimo_colocated.launch.options import option, real, share, switch, whole

_MEMORY = ("keep", "recompute", "offload")


def layout_option(default: Layout | None, text: str, module: str) -> Any:
    """Return a field that takes a module's layout.

    Args:
        default: the layout if the option is not given.
        text: for ``--help``.
        module: ``"language"`` or an encoder's name, as the field is called.
    """
    return option(default, text, lambda given: Layout.parse(given, module))


@dataclass(frozen=True)
class TrainingOptions:
    """What a user asks for, besides the encoders."""

    language: Layout = layout_option(
        Layout(), "layout of the language model, such as tp=2,cp=2,dp=2", LANGUAGE
    )
    steps: int = option(600, "training steps", whole(1))
    seed: int = option(1234, "of the initial weights and of the order of the data", whole(0))
    global_batch_size: int = option(32, "samples per step over all ranks", whole(1))
    micro_batches: int = option(1, "microbatches per step", whole(1))
    encode_ahead: int | None = option(
        None, "microbatches that are encoded together, with a pipelined language model (pp > 1), "
        "all of a step by default; without stages those that are encoded and sent off before the "
        "language model needs them, none by default", whole(1),
    )  # fmt: skip
    encode_in_bubbles: int = option(
        0, "of a pipelined language model (pp > 1), how many of a step's last microbatches are "
        "encoded while a stage waits for the others, at most --micro-batches less pp", whole(0),
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
    experts: int = option(
        0, "experts in place of each MLP of the language model, 0 for none; its layout may have "
        "ep (ranks that share them out) and etp (ranks for each, tp by default)", whole(0),
    )  # fmt: skip
    bridge: str = option(
        "routed", "how encoder rows reach the language model: each to the ranks that own its "
        "position (routed), or all to every rank of a replica (gather)", str, "gather", "routed",
    )  # fmt: skip
    distributed_optimizer: bool = switch(True, "shard the optimizer's state over DP")
    overlap_grad_reduce: bool = switch(True, "reduce gradients while backward still runs")
    overlap_param_gather: bool = switch(
        True, "gather updated weights while forward runs; without a distributed optimizer every "
        "rank has them",
    )  # fmt: skip
    dtype: str = option(
        "float32", "of the weights and activations; gradients are summed in float32", str,
        "float32", "bfloat16", "float16",
    )  # fmt: skip
    dropout: float = option(0.0, "probability, in all modules", share)
    recompute: str = option(
        "none", "what is computed again in backward instead of kept: nothing, attention "
        "(selective) or whole layers (full), in all modules", str, "none", "selective", "full",
    )  # fmt: skip
    encoder_memory: str = option(
        "keep", "what becomes of the encoder's activations while the language model runs: they "
        "stay (keep), are computed again (recompute), or wait in host memory (offload)", str,
        *_MEMORY,
    )  # fmt: skip
    projector_memory: str = option(
        "keep", "the same of the encoder's output and the projector's activations", str, *_MEMORY
    )
    backend: str = option(
        "auto", "of the process groups; auto is nccl with enough GPUs, else gloo", str,
        "auto", "nccl", "gloo",
    )  # fmt: skip
    timeout: int = option(60, "seconds after which a rank that does not answer is lost", whole(1))
    nproc: int | None = option(
        None, "processes to start; the layouts decide by default", whole(1)
    )
    out: Path = option(Path("runs"), "folder for checkpoints and results", Path)
    save_every: int = option(50, "steps between checkpoints, 0 for none", whole(0))
    background_saves: bool = switch(
        True, "go on training while a checkpoint's files are written, from a copy in host memory"
    )
    checkpoint_digests: bool = switch(True, "compare digests of the checkpoint's files on resume")
    fresh: bool = switch(False, "start anew instead of resuming from the last checkpoint")

    @property
    def encoders(self) -> dict[str, Layout]:
        """Layouts of the encoders by name; a subclass has them.

        Raises:
            NotImplementedError: it has none.
        """
        raise NotImplementedError(f"{type(self).__name__} names no encoders")

    @property
    def layouts(self) -> Layouts:
        """All layouts."""
        return Layouts(self.encoders, self.language)

    @property
    def world_size(self) -> int:
        """Ranks that the layouts span (the same for all, once checked)."""
        return next(iter(self.encoders.values())).size

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for ``summary.json`` and checkpoints."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {key: str(v) if isinstance(v, (Layout, Path)) else v for key, v in plain.items()}

    def check(self, world_size: int | None, limits: Limits) -> None:
        """Refuse options that do not fit together.

        Args:
            world_size: ranks already started (torchrun), or None when the layouts decide.
            limits: the model's: its sequence, its heads, and what its encoders encode.

        Raises:
            JobError: the first thing that does not fit, with layouts that would.
        """
        limits = dataclasses.replace(
            limits,
            global_batch_size=self.global_batch_size,
            micro_batches=self.micro_batches,
            eval_batch_size=self.eval_batch_size,
            sequence_parallel=self.sequence_parallel,
            world_size=self.nproc if world_size is None else world_size,
            experts=self.experts,
            language_layers=self.language_layers,
            virtual_stages=self.virtual_stages,
        )
        check_layouts(self.layouts, limits)
        self._check_pipeline()
        if self.encode_in_bubbles:
            self._check_bubbles()

    def check_nproc(self, world_size: int | None) -> None:
        """Refuse another number of processes than the ranks that were started.

        Raises:
            JobError: ``--nproc`` is not that number.
        """
        if world_size is not None and self.nproc not in (None, world_size):
            raise JobError(
                f"--nproc {self.nproc} was given, but {world_size} ranks were started; leave it out"
            )

    def _check_bubbles(self) -> None:
        """What encoding in the bubbles of a pipeline needs; the rest is checked in the step."""
        given, stages = f"--encode-in-bubbles {self.encode_in_bubbles}", self.language.pp
        most = max(self.micro_batches - stages, 0)
        if stages == 1 or self.virtual_stages > 1 or self.bridge == "gather":
            raise JobError(
                f"{given} needs a pipelined language model (--language pp=2) with --virtual-stages "
                f"1 and --bridge routed, got pp={stages}, {self.virtual_stages} and {self.bridge}"
            )
        if self.encode_ahead is not None:
            raise JobError(f"{given} and --encode-ahead {self.encode_ahead}: give one of them")
        if self.encode_in_bubbles > most:
            raise JobError(
                f"{given} of --micro-batches {self.micro_batches}: the first stage begins with "
                f"{stages} before it waits for the others, so it can be at most {most}"
            )

    def _check_pipeline(self) -> None:
        """What a pipelined language model needs besides a layout that fits."""
        stages, virtual = self.language.pp, self.virtual_stages
        if stages > 1 and self.bridge == "gather" and self.experts:
            raise JobError(
                f"--experts {self.experts} with --language pp={stages} needs --bridge routed, got "
                "gather, which wants the ranks of a replica next to each other, stages and all"
            )
        if virtual > 1 and stages == 1:
            raise JobError(
                "--virtual-stages is for a pipelined language model; add pp=2 to --language"
            )
        if self.encode_ahead is not None and stages == self.micro_batches == 1:
            raise JobError(
                f"--encode-ahead {self.encode_ahead} encodes further microbatches while the "
                "language model works on one, and --micro-batches 1 has no further ones; use 2 or "
                "more, or add pp=2 to --language"
            )
        if virtual > 1 and self.micro_batches % stages:
            raise JobError(
                f"--virtual-stages {virtual} interleaves groups of {stages} microbatches, got "
                f"--micro-batches {self.micro_batches}; use a multiple of {stages}"
            )
        if virtual > 1 and (self.encode_ahead or self.micro_batches) < self.micro_batches:
            raise JobError(
                f"--encode-ahead {self.encode_ahead} needs --virtual-stages 1, got {virtual}: with "
                "virtual stages all microbatches of a step are encoded together"
            )
