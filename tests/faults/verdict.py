# SPDX-License-Identifier: Apache-2.0
"""Compares what a job said and left with the journal: was the message right, is nobody left?

No torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mimo_colocated import phases
from mimo_colocated.forensics.evidence import SUMMARY, read_dumps
from tests.faults.cases import APART, WRITES, Case
from tests.faults.starts import Ended
from tests.faults.stops import (
    problems_of_a_failed_save,
    problems_of_a_stop,
    problems_of_ranks_apart,
)

GRACE_S = 12.0
"""Beyond the job's timeout: to save dumps, say it and end; on a busy machine."""

_FATES = {"SIGKILL": "was killed by SIGKILL", "SIGSTOP": r"was stopped \(SIGSTOP\)"}
_MESSAGE = (
    r"error: rank {rank} {fate} in the phase '(?P<phase>[^']*)'"
    r"(?: of (?P<kind>step|evaluation batch) (?P<step>\d+)(?:, microbatch (?P<microbatch>\d+))?)?; "
    r"(?P<waiting>ranks? [\d, and-]+) waited for it in (?P<call>[\w ]+?(?: #\d+)?) of "
    r"(?P<group>all ranks|the group [^\[]*\[(?P<members>[\d, -]+)\]); "
    r"the other 7 ranks were ended"
)
# A mark is written down before it is made; a fault of a timer may fall in between.
_RACE_S = 0.02
# Waits before there is a process group to enter a collective of.
_BEFORE_GROUPS = ("init_process_group", "the making")
# A collective that overlaps is followed by others before its rank waits for it.
_RECENT = 60


@dataclass(frozen=True)
class Outcome:
    """What is known after a case.

    Attributes:
        case: what was done.
        code: exit code of the launcher, ``None`` if it hung.
        errors: what it wrote to stderr.
        seconds: from the fault to the launcher's end; -1 if the fault did not happen.
        left: processes that were left behind.
        journal: rank -> its lines.
        out: the job's output folder.
        timeout: of the job, in seconds.
        output: what it wrote to stdout.
        checkpoints: names in its folder of them, and what is wrong with each.
        again: how the same command ended without the fault; of a fault that nobody is lost by.
        trained: what each step of a run without faults did.
    """

    case: Case
    code: int | None
    errors: str
    seconds: float
    left: list[str]
    journal: dict[int, list[dict[str, Any]]]
    out: Path
    timeout: float
    output: str = ""
    checkpoints: dict[str, str] = field(default_factory=dict)
    again: Ended | None = None
    trained: list[tuple[Any, ...]] = field(default_factory=list)

    @property
    def message(self) -> str:
        """The sentence for the user."""
        lines = [line for line in self.errors.splitlines() if line.startswith("error: ")]
        return lines[0] if lines else self.errors.strip()[-300:]


@dataclass
class Verdict:
    """Whether a case passed.

    Attributes:
        problems: what was wrong; empty if it passed.
        phase: where the rank was by the journal.
        call: the collective that was named.
    """

    phase: str = ""
    call: str = ""
    problems: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Nothing was wrong."""
        return not self.problems


def judge(outcome: Outcome) -> Verdict:
    """Compare; every problem is listed."""
    verdict = Verdict(phase=_truth(outcome)[0]["phase"])
    if outcome.seconds < 0:
        verdict.problems.append("the fault did not happen")
        return verdict
    if not outcome.case.loses_a_rank:
        verdict.problems += _without_a_loss(outcome)
        return verdict
    verdict.problems += _end(outcome)
    pattern = _MESSAGE.format(rank=outcome.case.rank, fate=_FATES[outcome.case.signal])
    match = re.fullmatch(pattern, outcome.message)
    if match is None:
        verdict.problems.append(f"the message: {outcome.message}")
        return verdict
    verdict.call = f"{match['call']} of {match['group']}"
    verdict.problems += [*_place(outcome, match), *_wait(outcome, match), *_files(outcome, match)]
    return verdict


def _without_a_loss(outcome: Outcome) -> Iterator[str]:
    """Of a job that is told to stop or cannot save."""
    yield from _in_time(outcome, GRACE_S)
    if outcome.case.signal == "SIGTERM":
        yield from problems_of_a_stop(outcome)
    elif outcome.case.signal == APART:
        yield from problems_of_ranks_apart(outcome)
    else:
        yield from problems_of_a_failed_save(outcome, WRITES[outcome.case.signal])


def _in_time(outcome: Outcome, limit: float) -> Iterator[str]:
    if outcome.code is None:
        yield "the launcher hung"
    if outcome.seconds > limit:
        yield f"ended after {outcome.seconds:.1f} s, allowed are {limit:g}"
    if outcome.left:
        yield f"left behind: processes {', '.join(outcome.left)}"


def _end(outcome: Outcome) -> Iterator[str]:
    limit = outcome.timeout + GRACE_S if outcome.case.signal == "SIGSTOP" else GRACE_S
    yield from _in_time(outcome, limit)
    if outcome.code not in (None, 1):
        yield f"exit code {outcome.code}"
    lines = outcome.errors.splitlines()
    expected = ("error: ", "full traceback: ", "who waits for whom: ")
    others = [line for line in lines if not line.startswith(expected)]
    if others or sum(line.startswith("error: ") for line in lines) != 1:
        yield f"not one message: {outcome.errors[-500:]}"


def _truth(outcome: Outcome) -> list[dict[str, Any]]:
    """Marks that may have been the last one: one, or two that race with the fault."""
    marks = [{"phase": phases.START, "step": -1, "microbatch": -1, "at": 0.0}]
    fault = float("inf")
    for event in outcome.journal[outcome.case.rank]:
        if "fault" in event:
            fault = event["at"]
        if "phase" in event:
            marks.append(event)
    return marks[-1:] if marks[-1]["at"] < fault - _RACE_S else marks[-3:][::-1]


def _place(outcome: Outcome, match: re.Match[str]) -> Iterator[str]:
    said = (
        match["phase"],
        int(match["step"]) if match["step"] else -1,
        int(match["microbatch"]) if match["microbatch"] else -1,
    )
    true = [(mark["phase"], mark["step"], mark["microbatch"]) for mark in _truth(outcome)]
    if said not in true and said[:2] != (true[0][0], true[0][1]):
        yield f"the place: said {said}, was {true[0]}"
    elif said[2] not in [microbatch for _, _, microbatch in true]:
        yield f"the microbatch: said {said}, was {true[0]}"


def _wait(outcome: Outcome, match: re.Match[str]) -> Iterator[str]:
    """The ranks that are said to wait did enter a collective of that group, with the lost rank."""
    members = range(8) if match["members"] is None else ranks_of(match["members"])
    if outcome.case.rank not in members:
        yield f"{match['group']} is said to wait for rank {outcome.case.rank}, which is not in it"
    for rank in ranks_of(match["waiting"].partition(" ")[2]):
        if match["call"] in _BEFORE_GROUPS:
            if rank not in members:
                yield f"rank {rank} is said to wait for {match['group']}, which it is not in"
            continue
        events = [event for event in outcome.journal[rank] if "collective" in event][-_RECENT:]
        entered = [event["ranks"] for event in events]
        if rank not in members or (list(members) not in entered and not _pairs(entered, members)):
            yield f"rank {rank} is said to wait in {match['group']}, which it did not enter"


def _pairs(entered: list[list[int]], members: Any) -> bool:
    """Sends and receives name two ranks of a larger group."""
    return any(set(members) <= set(ranks) for ranks in entered)


def _files(outcome: Outcome, match: re.Match[str]) -> Iterator[str]:
    folder = outcome.out / "errors" / "flight_recorder"
    saved = set(read_dumps(folder))
    wanted = set(range(8)) - {outcome.case.rank}
    entered = {rank for rank in wanted if any("collective" in e for e in outcome.journal[rank])}
    if match["phase"] == phases.START:  # some have no process group yet: nothing to save
        wanted = entered | (saved & wanted)
    if saved != wanted:
        yield f"dumps were saved of ranks {sorted(saved)}, not of {sorted(wanted)}"
    path = folder / SUMMARY
    text = path.read_text() if path.exists() else ""
    if match[0].removeprefix("error: ") not in text:
        yield f"{SUMMARY} does not say what the message says"
    line = f"  rank {outcome.case.rank}: the phase '{match['phase']}'"
    if line not in text or "Waiting for it:" not in text:
        yield f"{SUMMARY} lacks who waits for rank {outcome.case.rank}"


def ranks_of(text: str) -> list[int]:
    """Ranks from words.

    >>> ranks_of("0-2, 5 and 7")
    [0, 1, 2, 5, 7]
    """
    ends = (part.partition("-") for part in re.findall(r"\d+(?:-\d+)?", text))
    return [rank for low, _, high in ends for rank in range(int(low), int(high or low) + 1)]
