# SPDX-License-Identifier: Apache-2.0
"""Options of the commands, read by jsonargparse: from the command line, or a YAML file.

``mimo doctor`` has to say that jsonargparse is missing, so its one option is read by argparse
there.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mimo_colocated.launch import options as parsers
from mimo_colocated.launch.errors import JobError
from mimo_colocated.launch.launcher import REPORTS_VARIABLE
from mimo_colocated.launch.layouts import Layout

if TYPE_CHECKING:
    from argparse import ArgumentParser
else:
    try:
        from jsonargparse import ArgumentParser
    except ImportError:  # only `mimo doctor` goes on
        from argparse import ArgumentParser

COMMANDS = {
    "import": "importing",
    "export": "exporting",
    "check": "checking",
    "calibrate": "calibrating",
    "eval": "evaluating",
    "generate": "generating",
}
"""Command that runs on ranks -> module."""
ALONE = {"plan": "planning", "draw": "drawing", "report": "reporting"}
"""Command that runs on none -> module."""
ENCODERS = ("vision", "audio")
"""Options that give an encoder its layout."""
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class CommandOptions:
    """Options of a command that runs on ranks.

    Attributes:
        command: its name.
        source: the Hugging Face folder; None where the checkpoint says which.
        target: what is written, if anything is.
        checkpoint: what is exported, evaluated or asked, if anything is.
        encoders: option -> layout, of those that were given.
        language: layout of the language model.
        dtype: of the weights; None for the folder's.
        backend, timeout: of the process groups.
        more: what only this command has.
    """

    command: str
    source: Path | None
    target: Path
    checkpoint: Path
    encoders: Mapping[str, Layout]
    language: Layout
    dtype: str | None
    backend: str
    timeout: int
    more: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        """The Hugging Face folder of a command that is always given one."""
        assert self.source is not None
        return self.source

    @property
    def world_size(self) -> int:
        """Ranks that the language model spans."""
        return self.language.size

    @property
    def out(self) -> Path:
        """Where ranks leave tracebacks, a folder of each start: never in what is written."""
        # The launcher's random name is the same on all ranks; under torchrun each has a folder.
        start = Path(os.environ.get(REPORTS_VARIABLE, str(os.getpid()))).name
        return Path(tempfile.gettempdir()) / f"mimo-{self.command}-{start}"


class Parser(ArgumentParser):
    """A parser whose error is one sentence."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise instead of printing the usage.

        Raises:
            JobError: always.
        """
        cause = _cause(ex)
        said = message if cause is None or cause in message else cause
        text = " ".join(said.split()).removeprefix("Parser ").removeprefix("argument ")
        raise JobError(f"{text}; --help lists all options")


def _cause(error: BaseException | None) -> str | None:
    """Words of ours below an error of the library."""
    while error is not None:
        if isinstance(error, (JobError, argparse.ArgumentTypeError)):
            return str(error)
        error = error.__cause__ or error.__context__
    return None


def read(command: str, argv: Sequence[str]) -> CommandOptions:
    """Read the options of a command.

    Args:
        command: one of :data:`COMMANDS`.
        argv: what comes after it.

    Raises:
        JobError: an option is wrong.
        SystemExit: after ``--help``.
    """
    found = vars(parser_of(command).parse_args(list(argv)))
    found.pop("config", None)
    if command == "generate" and "=" not in (found["audio"] or "="):
        raise JobError(
            f"--audio {found['audio']!r} is no layout, such as tp=2,dp=4; a sound that is played "
            "before the question is given with --sound"
        )
    layouts = {
        name: Layout.parse(text, name)
        for name in (*ENCODERS, "language")
        if (text := found.pop(name, None)) is not None
    }
    language = layouts.pop("language", Layout(dp=found.pop("ranks", 1)))
    paths = {name: _path(found.pop(name, None)) for name in ("source", "target", "checkpoint")}
    own = {name: found.pop(name) for name in ("dtype", "backend", "timeout")}
    return CommandOptions(command, encoders=layouts, language=language, more=found, **paths, **own)


def parser_of(command: str) -> ArgumentParser:
    """Return the parser of one of :data:`COMMANDS` or :data:`ALONE`."""
    parser = Parser(prog=f"mimo {command}", description=DESCRIPTIONS[command])
    parser.add_argument("--config", action=_from_file(), help="YAML file with options")
    if command in COMMANDS:
        if command != "calibrate":
            _layouts(parser)
        _of_ranks(parser, command)
    _OWN[command](parser)
    return parser


def _from_file() -> type[argparse.Action]:
    from jsonargparse import ActionConfigFile

    return ActionConfigFile


WHOLE = parsers.Number(parsers.whole(1), "whole number from 1")
_ABOVE_ZERO = parsers.Number(parsers.real(0.0, low_included=False), "number above 0")
_SEED = parsers.Number(parsers.whole(0), "whole number from 0")
_PART = parsers.Number(parsers.part, "number above 0, to 1")
_SHARE = parsers.Number(parsers.share, "number from 0 to below 1")


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text).expanduser()


def _layouts(parser: argparse.ArgumentParser) -> None:
    for name in (*ENCODERS, "language"):
        axes = "tp=2,cp=2,dp=2" if name == "language" else "tp=2,dp=4"
        alone = "one rank" if name == "language" else "all of it on every rank"
        parser.add_argument(
            f"--{name}",
            metavar="LAYOUT",
            default=None,
            help=f"layout of the {name} part, as in {axes}; without: {alone}",
        )


_DTYPE_OF = {"calibrate": "of what is measured; without: bfloat16 on GPUs, float32 on CPUs"}


def _of_ranks(parser: argparse.ArgumentParser, command: str) -> None:
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32" if command == "check" else None,
        help=_DTYPE_OF.get(command, "of the weights; without: the folder's"),
    )
    parser.add_argument(
        "--backend", choices=("auto", "nccl", "gloo"), default="auto", help="of process groups"
    )
    parser.add_argument(
        "--timeout",
        type=WHOLE,
        default=1800,
        help="seconds after which a rank that does not answer is lost",
    )


def _import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="HF_FOLDER", help="config.json and safetensors")
    parser.add_argument("target", metavar="OUT", help="folder for the checkpoint")


def _export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a checkpoint, or a run: its last checkpoint"
    )
    parser.add_argument("target", metavar="OUT", help="folder to write")
    parser.add_argument(
        "--source",
        metavar="HF_FOLDER",
        default=None,
        help="the folder that the model came from; without: the one that the checkpoint names",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace a model that is in OUT, when the new one is whole",
    )


def _check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="HF_FOLDER", help="config.json and safetensors")
    parser.add_argument(
        "--bound",
        type=_ABOVE_ZERO,
        default=None,
        help="largest difference over the largest logit; without: 1e-5, in bfloat16 2e-2, in "
        "float16 5e-3",
    )
    parser.add_argument(
        "--control",
        action="store_true",
        help="change one weight by 1e-3: the check must fail",
    )


def _weights(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        metavar="RUN_OR_FOLDER",
        help="a run: its last checkpoint; one of its checkpoints; or a Hugging Face folder",
    )
    parser.add_argument(
        "--source",
        metavar="HF_FOLDER",
        default=None,
        help="the folder that a run's model came from; without: the one that its checkpoint names",
    )


def _eval(parser: argparse.ArgumentParser) -> None:
    _weights(parser)
    parser.add_argument(
        "--recipe",
        default=None,
        help="whose held-out data it is, by name or YAML file; without: of the recipe that the run "
        "was trained by",
    )
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="SOURCE",
        help="held-out data in place of the recipe's, such as '{kind: chat, settings: {path: "
        "a.jsonl}}'; may be given several times",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="another value for a field of the recipe that is read here, such as "
        "evaluation.samples=100; may be given several times",
    )
    parser.add_argument(
        "--out",
        default=None,
        help="folder for evaluation.json; without: RUN/evaluation, and of a folder runs/evaluation",
    )


def _generate(parser: argparse.ArgumentParser) -> None:
    _weights(parser)
    add = parser.add_argument
    add("question", metavar="QUESTION", help="what is asked")
    add(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help="shown before the question; may be given several times",
    )
    add(
        "--sound",
        action="append",
        default=[],
        metavar="FILE",
        help="played before the question; may be given several times (--audio is a layout)",
    )
    add("--max-new-tokens", type=WHOLE, default=64, help="the answer is cut after so many")
    add(
        "--temperature",
        type=_ABOVE_ZERO,
        default=None,
        help="draw each token, from scores divided by it; without: the likeliest token",
    )
    add("--top-k", type=WHOLE, default=None, help="draw among so many tokens; without: all")
    add(
        "--top-p",
        type=_PART,
        default=None,
        help="draw among the likeliest that have this probability together; without: all",
    )
    add("--seed", type=_SEED, default=None, help="of the draws; without: 0")


def _calibrate(parser: argparse.ArgumentParser) -> None:
    add, some = parser.add_argument, WHOLE
    add("target", metavar="OUT", help="file for the machine, which `mimo plan --gpu OUT` reads")
    add("--ranks", type=some, default=8, help="of the job: as many as will train")
    add("--tokens", type=some, default=1024, help="of a rank, in every measurement")
    add("--width", type=some, default=1024, help="of the language model")
    add("--encoder-width", type=some, default=512, help="of the encoder")
    add("--heads", type=some, default=8, help="of the attention of either")
    add("--item-tokens", type=some, default=256, help="of an image, or what else is encoded")
    add("--seconds", type=_ABOVE_ZERO, default=3.0, help="for each of about fifteen measurements")


def _plan(parser: argparse.ArgumentParser) -> None:
    add, some = parser.add_argument, WHOLE
    add(
        "source",
        metavar="HF_FOLDER_OR_SHAPES",
        nargs="?",
        default=None,
        help="config.json, or a YAML file of shapes",
    )
    add("--recipe", default=None, help="plan a recipe of `mimo train`, by name or YAML file")
    first = "the recipe with the first row that it can take"
    add("--write-recipe", metavar="YAML", default=None, help=first)
    add("--gpus", type=some, default=8, help="of the job, one rank each")
    add("--gpu", default="h100", help="a100, h100, h200, b200, or a file with a machine")
    add("--seq", type=some, default=None, help="tokens of a sample; without: the recipe's, or 8192")
    add("--global-batch", type=some, default=None, help="samples of a step; likewise, or 8")
    for name in ENCODERS:
        add(
            f"--{name}-share",
            type=_SHARE,
            default=None,
            help=f"part of the tokens that are rows of {name}; without: a half, shared evenly",
        )
    add(
        "--item-tokens",
        type=some,
        default=None,
        help="of an image, where a folder's model takes any size; without: 1024",
    )
    add("--bridge", choices=("routed", "gather"), default="routed", help="that joins the two")
    add(
        "--encoder-cp",
        default=None,
        metavar="SIZES",
        help="CP of encoders that can cut their items, to try, as in 1,2,4; without: 1",
    )
    add("--frozen", default=None, help="modules that do not train, such as vision+language")
    add(
        "--encoder-memory",
        default=None,
        help="what may become of encoders' activations; without: keep,recompute,offload",
    )
    add("--replica-samples", default="1,2", help="samples of a replica in a microbatch, to try")
    add("--top", type=some, default=10, help="rows of the table")
    add("--why", metavar="LAYOUTS", default=None, help=_WHY)
    add("--json", default=None, help="file for all estimates that fit")
    add("--picture", default=None, help="file for bars of the table's rows: PNG, or SVG")


_WHY = (
    "explain a pair, as in tp=1,dp=8/tp=2,cp=2,dp=2: encoders in the model's order, then the "
    "language model; one layout alone is the homogeneous way"
)


def _draw(parser: argparse.ArgumentParser) -> None:
    add, some = parser.add_argument, WHOLE
    add("target", metavar="OUT", help="the picture: PNG, or SVG by its suffix")
    for name in (*ENCODERS, "language"):
        axes = "tp=2,cp=2,dp=2" if name == "language" else "tp=2,dp=4"
        add(
            f"--{name}", metavar="LAYOUT", default=None, help=f"layout of the {name} part: {axes}"
        )
    add("--bridge", choices=("routed", "gather"), default="routed", help="what is drawn")
    add("--samples", type=some, default=8, help="of a microbatch of all ranks")
    add("--seq", type=some, default=4096, help="tokens of a sample")
    add("--sequence-parallel", action="store_true", help="the language model cuts over TP, too")


def _report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="folder of a run of `mimo train`: its run.out")


_OWN: dict[str, Callable[[argparse.ArgumentParser], None]] = {
    "plan": _plan,
    "draw": _draw,
    "report": _report,
    "calibrate": _calibrate,
    "import": _import,
    "export": _export,
    "check": _check,
    "eval": _eval,
    "generate": _generate,
}
DESCRIPTIONS = {
    "import": "Write a checkpoint to train from, in any layout, from a Hugging Face folder.",
    "export": "Write a Hugging Face folder from a checkpoint of any layout.",
    "check": "Compare a model's logits here, in any layout, with transformers'.",
    "eval": "Measure loss and exact match of a model on held-out data, in any layout.",
    "generate": "Answer a question about images, sounds, or neither, with a model in any layout.",
    "calibrate": "Measure what `mimo plan` needs to know of this machine, in about a minute.",
    "plan": "Predict time and memory of all pairs of layouts, and of the best homogeneous ones. "
    "`mimo plan --calibrate OUT` is `mimo calibrate OUT`, for this machine's own figures.",
    "draw": "Draw which rank holds what on either side of the bridges.",
    "report": "Write RUN/report.html: a run, also one under way, on a page that needs no network.",
}
