# SPDX-License-Identifier: Apache-2.0
"""The faults as a campaign: the digits job on 8 ranks, without a fault and then once per case."""

from __future__ import annotations

import argparse
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from campaigns.command import Campaign, CampaignError, Console, verdict
from campaigns.pages import replace_between
from campaigns.record import ROOT, Record, Result
from tests.faults.cases import APART, COMMON, LAYOUTS, SIGNALS, WRITES, Case, draw
from tests.faults.journal import Control, read
from tests.faults.starts import Ended, prepare, start
from tests.faults.stops import checkpoints, trained
from tests.faults.verdict import GRACE_S, Outcome, Verdict, judge

DOCS = Path("docs/faults.md")
DOC_START = "<!-- the figures below are written by: make faults ARGS=--docs -->"
DOC_END = "<!-- end of the figures -->"
RANKS = 8
# More than any run takes that is not stuck, after its fault or without one.
_PATIENCE_S = 120.0
_FAULTS = {**{name: (name,) for name in SIGNALS}, "no write": tuple(WRITES), APART: (APART,)}
_COLUMNS = ("phase of the rank", *_FAULTS, *(f"end after {name}" for name in _FAULTS), "layouts")


class Faults(Campaign):
    """Kill, stop and tell ranks to stop in every phase, and keep them from saving."""

    module, title = "tests.faults", "Ranks killed, stopped, told to stop, and kept from saving"
    columns = ("case", "layout", "fault", "phase of the rank", "end after", "", "why")
    code = (*Campaign.code, "examples/mimo/digits/*.py", "tests/faults/*.py")
    folder = Path("runs/faults")

    def add_options(self, add: Callable[..., Any]) -> None:
        """See ``--help``."""
        add("--cases", type=int, default=75, help="how many (75)")
        add("--seed", type=int, default=1, help="of the draw (1)")
        add("--timeout", type=int, default=10, help="of the job, in seconds (10)")
        add("--only", type=int, default=0, help="the case of this number alone")
        add("--docs", action="store_true", help=f"write the figures into {DOCS}")

    def choose(self, given: argparse.Namespace) -> Sequence[str]:
        """The cases by number; what they are is drawn when runs without a fault are known."""
        self._given, self._out = given, given.out or self.folder
        numbers = range(1, given.cases + 1) if not given.only else [given.only]
        return [f"case-{number}" for number in numbers]

    def settings(self) -> dict[str, Any]:
        """Cases of another draw, or a job with another timeout, are others."""
        given = self._given
        return {"cases": given.cases, "seed": given.seed, "timeout": given.timeout}

    def run(self, left: Sequence[str], console: Console) -> Iterator[tuple[str, Result]]:
        """Case after case, each from an empty folder; what one leaves that fails is kept."""
        prepare()
        given = self._given
        with tempfile.TemporaryDirectory(prefix="faults-") as folder:
            runs = Runs(Path(folder), given.timeout)
            runs.control(console.note)
            for case in draw(given.cases, given.seed, runs.controls):
                name = f"case-{case.number}"
                if name in left:
                    result = result_of(*runs.case(case))
                    if not result["passed"]:
                        shutil.rmtree(self._out / name, ignore_errors=True)
                        shutil.copytree(runs.folder / name, self._out / name)
                    yield name, result

    def row(self, name: str, result: Result | None) -> tuple[str, ...]:
        """A case's cells."""
        if result is None:
            return (name, "", "", "", "", "missing", "")
        why = result["call"] if result["passed"] else result["reason"]
        end = f"{result['seconds']:.1f} s"
        cells = (result["layout"], result["words"], result["phase"], end)
        return (name, *cells, verdict(result), why)

    def close(self, given: argparse.Namespace, record: Record) -> Sequence[str]:
        """Write the figures into the page."""
        if given.docs:
            text = figures(list(record.results.values()), given.seed, given.timeout)
            replace_between(ROOT / DOCS, DOC_START, DOC_END, text)
        return ()


def result_of(case: Case, outcome: Outcome, judged: Verdict) -> Result:
    """Return what is kept of a case."""
    return {
        "passed": judged.passed,
        "reason": "; ".join(judged.problems),
        "seconds": round(outcome.seconds, 2),
        "layout": case.layout,
        "signal": case.signal,
        "words": case.words(),
        "phase": judged.phase,
        "call": judged.call,
    }


class Runs:
    """All starts of one campaign.

    Args:
        folder: for their output.
        timeout: of the job, in seconds.
    """

    def __init__(self, folder: Path, timeout: int) -> None:
        self.folder, self.timeout = folder, timeout
        self.controls: dict[str, Control] = {}
        self.trained: dict[str, list[tuple[Any, ...]]] = {}

    def control(self, note: Callable[[str], None]) -> None:
        """A run without fault per layout, and one that resumes it.

        Raises:
            CampaignError: one of them fails.
        """
        for layout in LAYOUTS:
            events = []
            for part in ("train", "resume"):
                name = f"{layout.name}-{part}"
                ended = self._start(name, layout.name, None, part == "resume")
                if ended.code != 0 or ended.left:
                    raise CampaignError(
                        f"a run without any fault fails: {name}: exit code {ended.code}, left "
                        f"{ended.left}: {ended.errors}"
                    )
                events.append({rank: read(self.folder / name, rank) for rank in range(RANKS)})
            self.controls[layout.name] = Control(*events)
            self.trained[layout.name] = trained(self.folder / f"{layout.name}-train" / "out")
            note(f"without a fault: {layout.name} trains, saves, resumes and reads")

    def case(self, case: Case) -> tuple[Case, Outcome, Verdict]:
        """One case, judged."""
        name = f"case-{case.number}"
        ended = self._start(name, case.layout, case, case.resumes)
        journal = {rank: read(self.folder / name, rank) for rank in range(RANKS)}
        faults = [event["at"] for event in journal[case.rank] if "fault" in event]
        saved = checkpoints(self.folder / name / "out")  # before another run adds to them
        again = None if case.loses_a_rank else self._again(case, name)
        outcome = Outcome(
            case=case,
            code=ended.code,
            errors=ended.errors,
            seconds=ended.at - faults[0] if faults else -1.0,
            left=ended.left,
            journal=journal,
            out=self.folder / name / "out",
            timeout=self.timeout,
            output=ended.output,
            checkpoints=saved,
            again=again,
            trained=self.trained[case.layout],
        )
        return case, outcome, judge(outcome)

    def _again(self, case: Case, name: str) -> Ended:
        return self._start(f"{name}-again", case.layout, None, False, self.folder / name)

    def _start(
        self, name: str, layout: str, case: Case | None, resumes: bool, before: Path | None = None
    ) -> Ended:
        """One start; in the output folder of an earlier one if ``before`` is its folder."""
        folder = self.folder / name
        folder.mkdir()
        out = (before or folder) / "out"
        if resumes:
            shutil.copytree(self.folder / f"{layout}-train" / "out", out)
        arguments = next(each.arguments for each in LAYOUTS if each.name == layout)
        command = [*arguments.split(), *COMMON.split(), "--timeout", str(self.timeout)]
        deadline = self.timeout + GRACE_S + _PATIENCE_S
        return start([*command, "--out", str(out)], folder, case, deadline)


def figures(results: Sequence[Result], seed: int, timeout: float) -> str:
    """The figures of the page: how many passed of what, and a row per phase."""
    good = sum(result["passed"] for result in results)
    text = (
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
    rows = [_COLUMNS, ("---",) * len(_COLUMNS), *_rows(results)]
    return "\n".join([text, "", *(f"| {' | '.join(cells)} |" for cells in rows)])


def _rows(results: Sequence[Result]) -> Iterator[tuple[str, ...]]:
    """Per phase in which a rank really was: passed of all, by signal; seconds; layouts."""
    for phase in sorted({result["phase"] for result in results}):
        those = [result for result in results if result["phase"] == phase]
        layouts = ", ".join(sorted({result["layout"] for result in those}))
        yield (phase, *_by_fault(those), layouts)
    yield ("all", *_by_fault(results), "")


def _by_fault(those: Sequence[Result]) -> tuple[str, ...]:
    each = [[r for r in those if r["signal"] in names] for names in _FAULTS.values()]
    return (*map(_share, each), *map(_longest, each))


def _share(those: Sequence[Mapping[str, Any]]) -> str:
    return f"{sum(r['passed'] for r in those)} of {len(those)}" if those else ""


def _longest(those: Sequence[Mapping[str, Any]]) -> str:
    return f"{max(r['seconds'] for r in those):.1f} s" if those else ""
