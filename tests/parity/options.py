# SPDX-License-Identifier: Apache-2.0
"""Options of ``make parity``: the command line, and the environment where it says nothing."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.parity.rows import CHANGE_STEPS, DEFAULT_ROWS, NIGHTLY_ROWS, Row, choose


class OptionError(ValueError):
    """One sentence on what is wrong with an option."""


@dataclass(frozen=True)
class Options:
    """What the user asked for.

    Attributes:
        rows: to run, in order.
        nightly: of the nightly table.
        thresh: largest relative error of fp32 losses, logits, changes of weights and curves.
        steps: of training per row.
        micro_batches: per step, for the rows that leave it open.
        resume: keep the rows that an earlier run of the same code and options has passed.
        out: folder of ``summary.json``.
        docs: file to write the table and its explanation to; None for none.
        backend: of the process groups.
        row_timeout: seconds after which a row without a result is ended.
    """

    rows: tuple[Row, ...]
    nightly: bool
    thresh: float
    steps: int
    micro_batches: int
    resume: bool
    out: Path
    docs: Path | None
    backend: str
    row_timeout: float

    def as_dict(self) -> dict[str, Any]:
        """What decides whether an earlier result still counts."""
        return {
            "THRESH": self.thresh,
            "TRAIN_STEPS": self.steps,
            "MICRO_BATCHES": self.micro_batches,
            "backend": self.backend,
        }


def _whole(low: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not (text.isascii() and text.isdecimal() and low <= int(text) <= 10_000):
            raise argparse.ArgumentTypeError(
                f"must be a whole number from {low} to 10000, got {text!r}"
            )
        return int(text)

    return parse


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise OptionError(f"{message.removeprefix('argument ')}; --help lists all options")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m tests.parity", allow_abbrev=False, description=__doc__)
    add = parser.add_argument
    add("--thresh", metavar="THRESH", help="bound of fp32 losses and weights (1e-4)")
    add("--train-steps", metavar="TRAIN_STEPS", help="training steps of each row (10)")
    add("--micro-batches", metavar="MICRO_BATCHES", help="of rows that leave it open (8)")
    add("--layouts", metavar="LAYOUTS", help="rows by name or pattern, separated by commas")
    add("--nightly", action="store_true", help="every pair of 8-rank layouts, and resume")
    add("--fresh", action="store_true", help="run again what an earlier nightly run has passed")
    add("--out", type=Path, help="results (runs/parity; runs/parity-nightly)")
    add("--docs", type=Path, metavar="FILE", help="also write the table and how to read it")
    add("--backend", choices=("auto", "nccl", "gloo"), default="auto", help="of process groups")
    add("--row-timeout", type=_positive, default=180.0, help="seconds for one row (180)")
    add("--list", action="store_true", help="print the rows' names")
    return parser


def parse(argv: Sequence[str], environment: Mapping[str, str] = os.environ) -> Options | None:
    """Options from ``argv`` and, where it says nothing, the environment; None after ``--list``.

    Raises:
        OptionError: one sentence on what is wrong.
        SystemExit: after ``--help``.
    """
    given = _parser().parse_args(list(argv))
    table = NIGHTLY_ROWS if given.nightly else DEFAULT_ROWS
    if given.list:
        print("\n".join(row.name for row in table))
        return None

    def value(name: str, flag: str | None, parse: Callable[[str], Any], default: str) -> Any:
        text = environment.get(name, default) if flag is None else flag
        try:
            return parse(text or default)
        except argparse.ArgumentTypeError as error:
            raise OptionError(f"{name} {error}") from error

    layouts = value("LAYOUTS", given.layouts, str, "")
    try:
        rows = choose(table, layouts.replace(",", " ").split())
    except ValueError as error:
        raise OptionError(str(error)) from error
    folder = "runs/parity-nightly" if given.nightly else "runs/parity"
    return Options(
        rows=rows,
        nightly=given.nightly,
        thresh=value("THRESH", given.thresh, _positive, "1e-4"),
        steps=value("TRAIN_STEPS", given.train_steps, _whole(CHANGE_STEPS), "10"),
        micro_batches=value("MICRO_BATCHES", given.micro_batches, _whole(1), "8"),
        resume=given.nightly and not given.fresh,
        out=given.out or Path(folder),
        docs=given.docs,
        backend=given.backend,
        row_timeout=given.row_timeout,
    )
