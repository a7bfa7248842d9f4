# SPDX-License-Identifier: Apache-2.0
"""Options of ``make bench``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errors import JobError

from benchmarks.cases import Pair
from benchmarks.kinds import KINDS, Kind


@dataclass(frozen=True)
class Options:
    """What the user asked for.

    Attributes:
        kinds: to measure, in order.
        layouts: pairs; each kind has its own if there are none.
        quick: fewer and smaller cells, under a minute.
        backend: of the process groups.
        out: folder of the results.
        docs: file whose tables are replaced by this run's; None for none.
        timeout: seconds after which a cell without a result is ended.
    """

    kinds: tuple[Kind, ...]
    layouts: tuple[Pair, ...]
    quick: bool
    backend: str
    out: Path
    docs: Path | None
    timeout: float

    @property
    def world_size(self) -> int:
        """Ranks to start."""
        return self.layouts[0].world_size if self.layouts else 8


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise JobError(f"{message.removeprefix('argument ')}; --help lists all options")


def parse(argv: Sequence[str]) -> Options:
    """Read and check the command line.

    Raises:
        JobError: one sentence on what is wrong.
        SystemExit: after ``--help``.
    """
    parser = _Parser(prog="python -m benchmarks", allow_abbrev=False)
    add = parser.add_argument
    names = ", ".join(kind.name for kind in KINDS)
    add("--only", metavar="KINDS", default="", help=f"of {names}, separated by commas")
    add(
        "--layout",
        action="append",
        default=[],
        metavar="ENCODER/LANGUAGE",
        help="such as tp=2,dp=4/tp=2,cp=2,dp=2; may be given several times",
    )
    add("--quick", action="store_true", help="fewer and smaller cells, under a minute")
    add("--backend", choices=("auto", "nccl", "gloo"), default="auto", help="of process groups")
    add("--out", type=Path, default=Path("runs/bench"), help="results (runs/bench)")
    add("--docs", type=Path, metavar="FILE", help="also replace the tables in this file")
    add("--timeout", type=float, default=300.0, help="seconds for one cell (300)")
    given = parser.parse_args(list(argv))
    return Options(
        kinds=_kinds(given.only),
        layouts=_layouts(given.layout),
        quick=given.quick,
        backend=given.backend,
        out=given.out,
        docs=given.docs,
        timeout=given.timeout,
    )


def _kinds(only: str) -> tuple[Kind, ...]:
    wanted = [name.strip() for name in only.split(",") if name.strip()]
    known = {kind.name: kind for kind in KINDS}
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise JobError(f"--only {unknown[0]!r} is not measured; there are {', '.join(known)}")
    return tuple(kind for kind in KINDS if not wanted or kind.name in wanted)


def _layouts(texts: Sequence[str]) -> tuple[Pair, ...]:
    pairs = tuple(Pair.parse(text) for text in texts)
    sizes = sorted({pair.world_size for pair in pairs})
    if len(sizes) > 1:
        raise JobError(
            f"--layout: all pairs must span the same number of ranks, got {sizes}; run the command "
            "once per number"
        )
    return pairs
