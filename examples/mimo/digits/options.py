# SPDX-License-Identifier: Apache-2.0
"""The options of the digits job, beside those that every colocated job has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mimo_colocated.launch.errors import JobError
from mimo_colocated.launch.freezing import Freezable
from mimo_colocated.launch.layouts import LANGUAGE, Layout, Limits
from mimo_colocated.launch.options import option, parse, switch
from mimo_colocated.launch.training_options import TrainingOptions, layout_option

HEADS, SEQUENCE_LENGTH = 8, 32
ITEMS = {"vision": "images", "audio": "sounds"}
"""Encoder -> what it encodes."""
FREEZABLE = Freezable(tuple(ITEMS))


@dataclass(frozen=True)
class Options(TrainingOptions):
    """What the user asked for; the defaults are what ``make train`` runs."""

    vision: Layout = layout_option(
        Layout(tp=2, dp=4), "layout of the vision encoder, such as tp=2,dp=4", "vision"
    )
    audio: Layout | None = layout_option(
        None, "layout of an audio encoder, such as tp=1,dp=8: samples then show digits as images, "
        "as sounds, as a mix of both or as text; without it there are images only", "audio",
    )  # fmt: skip
    language: Layout = layout_option(
        Layout(tp=2, cp=2, dp=2), "layout of the language model, such as tp=2,cp=2,dp=2", LANGUAGE
    )
    varied_samples: bool = switch(False, "samples show one to four digits instead of four")
    uneven_loss_mask: bool = switch(False, "count only some of each sample's answer digits")
    freeze: str = option(
        "", "what does not train, such as encoder+projector: any of "
        f"{', '.join(FREEZABLE.names)}; may change when the run resumes", FREEZABLE.read,
    )  # fmt: skip
    memory_plan: bool = switch(
        False, "print what each way to hold the encoder's activations would save, and end"
    )
    out: Path = option(Path("runs/digits"), "folder for checkpoints and results", Path)
    evaluate: bool = switch(True, "read the held-out images at the end")

    @property
    def encoders(self) -> dict[str, Layout]:
        """Layouts of the encoders that there are."""
        every = {"vision": self.vision, "audio": self.audio}
        return {name: layout for name, layout in every.items() if layout}


def _check_varied(options: Options) -> None:
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
    for name, layout in options.encoders.items():
        if layout.cp > 1 and options.bridge == "gather":
            raise JobError(
                f"{name} has cp={layout.cp}, and --bridge gather wants whole {ITEMS[name]} on "
                "every rank; use --bridge routed, or give those ranks to dp or tp"
            )
        if layout.cp > 1 and options.memory_plan:
            raise JobError(
                f"--memory-plan counts whole {ITEMS[name]} and {name} has cp={layout.cp}; plan "
                f"with tp={layout.tp},dp={layout.cp * layout.dp}"
            )
    sizes = {name: layout.dp for name, layout in options.layouts.modules.items()}
    if options.audio and options.bridge == "gather" and len(set(sizes.values())) > 1:
        said = ", ".join(f"{name} dp={size}" for name, size in sizes.items())
        raise JobError(
            "--bridge gather wants equally many rows of every sample where DP sizes differ, and "
            f"with --audio some samples have no image or no sound; got {said}; use --bridge "
            "routed, or one DP size for all"
        )


def _check_freeze(options: Options) -> None:
    for part in FREEZABLE.parts(options.freeze):
        if part.startswith("audio-") and options.audio is None:
            raise JobError(f"--freeze {part} is for a run with sounds; add --audio tp=1,dp=8")
    FREEZABLE.check(options.freeze, options.encoders)


def parse_options(argv: Sequence[str], world_size: int | None = None) -> Options:
    """Read and check the command line.

    Args:
        argv: the arguments after the script's name.
        world_size: ranks already started (torchrun), or None when the layouts decide.

    Raises:
        JobError: for a wrong option, and for what does not fit, with layouts that would.
        SystemExit: after ``--help``.
    """
    modules = (*ITEMS, LANGUAGE)
    options = parse(
        Options,
        argv,
        prog="train.py",
        description="Train a model to read handwritten digits, and spoken ones, on any layout.",
        metavars=dict.fromkeys(modules, "AXIS=SIZE,..."),
    )
    model = {"sequence_length": SEQUENCE_LENGTH, "heads": dict.fromkeys(modules, HEADS)}
    options.check(world_size, Limits(0, items=ITEMS, cut_items=tuple(ITEMS), **model))
    for check in (_check_varied, _check_bridge, _check_freeze):
        check(options)
    options.check_nproc(world_size)
    return options
