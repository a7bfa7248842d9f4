# SPDX-License-Identifier: Apache-2.0
"""What the user sees: a line per case, the tally, and ``docs/faults.md``'s table."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.faults.cases import APART, SIGNALS, WRITES, Case
from tests.faults.verdict import GRACE_S, Outcome, Verdict

DOC_START = "<!-- the figures below are written by: make faults ARGS=--docs -->"
DOC_END = "<!-- end of the figures -->"
_LOG_COLUMNS = 160
_FAULTS = {**{name: (name,) for name in SIGNALS}, "no write": tuple(WRITES), APART: (APART,)}
_COLUMNS = ("phase of the rank", *_FAULTS, *(f"end after {name}" for name in _FAULTS), "layouts")


@dataclass(frozen=True)
class Done:
    """A case that is over."""

    case: Case
    outcome: Outcome
    verdict: Verdict


def line(done: Done, total: int) -> str:
    """One line for a case."""
    case, verdict = done.case, done.verdict
    head = f"{case.number:3d}/{total} {'PASS' if verdict.passed else 'FAIL'}"
    what = f"{case.layout:8s} {case.words():55s} {done.outcome.seconds:5.1f} s"
    return f"{head} {what}  {verdict.call if verdict.passed else '; '.join(verdict.problems)}"


def show(results: Sequence[Done]) -> None:
    """The tally by phase."""
    table = Table(title="Ranks killed, stopped, told to stop, and kept from saving")
    for column in _COLUMNS:
        table.add_column(column)
    for cells in _rows(results):
        table.add_row(*cells)
    Console(width=None if sys.stdout.isatty() else _LOG_COLUMNS).print(table)


def closing_line(results: Sequence[Done], seed: int) -> str:
    """How many passed."""
    good = sum(done.verdict.passed for done in results)
    verdict = "PASS" if good == len(results) else "FAIL"
    return f"{verdict}: {good} of {len(results)} cases, seed {seed}"


def write_docs(path: Path, results: Sequence[Done], seed: int, timeout: float) -> None:
    """Put the figures into their place in a markdown file.

    Raises:
        ValueError: it has none.
    """
    text = path.read_text()
    if text.count(DOC_START) != 1 or text.count(DOC_END) != 1:
        raise ValueError(f"{path} must hold {DOC_START!r} and {DOC_END!r}, once each")
    before, _, rest = text.partition(DOC_START)
    figures = "\n".join(_markdown(results, seed, timeout))
    path.write_text(f"{before}{DOC_START}\n\n{figures}\n\n{DOC_END}{rest.partition(DOC_END)[2]}")


def _markdown(results: Sequence[Done], seed: int, timeout: float) -> Iterator[str]:
    good = sum(done.verdict.passed for done in results)
    yield (
        f"{good} of {len(results)} cases pass, seed {seed}. After SIGKILL and SIGSTOP: one message "
        "that names the rank, its phase and step and the collective that others waited in, true by "
        f"the journal; all processes gone in time (`--timeout {timeout:g}`, and {GRACE_S:g} s on "
        "top); the others' dumps and the summary saved. After SIGTERM: exit code 75 within "
        f"{GRACE_S:g} s, whole checkpoints, the newest that of the step the rank was in. After a "
        "write that failed, and where ranks 4-7 had another folder: one message with ranks and "
        "reason, earlier checkpoints whole. After these the same command goes on to bit-identical "
        "losses. The longest ends are given. "
        f"8 ranks, gloo, Python {platform.python_version()}, torch "
        f"{version('torch')}, megatron-core {version('megatron-core')}."
    )
    yield ""
    yield f"| {' | '.join(_COLUMNS)} |"
    yield "|---" * len(_COLUMNS) + "|"
    for cells in _rows(results):
        yield f"| {' | '.join(cells)} |"


def _rows(results: Sequence[Done]) -> Iterator[tuple[str, ...]]:
    """Per phase in which a rank really was: passed of all, by signal; seconds; layouts."""
    for phase in sorted({done.verdict.phase for done in results}):
        those = [done for done in results if done.verdict.phase == phase]
        by_signal = _by_fault(those)
        layouts = ", ".join(sorted({done.case.layout for done in those}))
        yield (phase, *map(_share, by_signal), *map(_longest, by_signal), layouts)
    by_signal = _by_fault(results)
    yield ("all", *map(_share, by_signal), *map(_longest, by_signal), "")


def _by_fault(those: Sequence[Done]) -> list[list[Done]]:
    return [[d for d in those if d.case.signal in names] for names in _FAULTS.values()]


def _share(those: Sequence[Done]) -> str:
    return f"{sum(d.verdict.passed for d in those)} of {len(those)}" if those else ""


def _longest(those: Sequence[Done]) -> str:
    return f"{max(d.outcome.seconds for d in those):.1f} s" if those else ""
