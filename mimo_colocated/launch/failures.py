# SPDX-License-Identifier: Apache-2.0
"""Which rank failed first, and why: from exit codes and reports to one sentence. No torch.

A rank that fails by an exception leaves a :class:`Report`; one that is killed cannot. Its peers
then fail too, because it no longer answers: those reports are of the kind ``"peer"`` and are never
the reason while there is a better one.
"""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mimo_colocated.launch.errors import JobError, Packages, one_sentence

if TYPE_CHECKING:
    from mimo_colocated.forensics.evidence import Evidence
    from mimo_colocated.forensics.who_waits import WhoWaits

# Ranks that do not stop when told to are killed after 30 s: a death that is noticed this long after
# the first report is a consequence, not the reason.
_SAME_MOMENT_S = 10.0

_PEER_GONE = re.compile(
    r"Connection (closed|reset|refused)|Broken pipe|Timed out|timed out|[Tt]imeout|gloo/transport"
    r"|ncclRemoteError|ncclSystemError|NCCL|DistStoreError|DistNetworkError|recvValue"
)


@dataclass(frozen=True)
class Report:
    """Why one rank stopped.

    Attributes:
        rank: global rank.
        kind: ``"job"`` (a sentence for the user), ``"error"`` (any other exception), ``"peer"``
            (another rank no longer answers) or ``"signal"`` (told to end by someone else).
        message: one sentence.
        log: file with the full traceback, empty if there is none.
        at: seconds since the epoch.
    """

    rank: int
    kind: str
    message: str
    log: str
    at: float

    @classmethod
    def of(cls, rank: int, error: BaseException, log: str, hint: str = Packages.hint) -> Report:
        """Describe ``error``, raised by ``rank``.

        Args:
            rank: of the whole job.
            error: that ends it.
            log: file with the full traceback, empty if there is none.
            hint: how to install packages, if one is missing.
        """
        kind = "error"
        if isinstance(error, JobError):
            kind = "job"
        elif isinstance(error, (RuntimeError, OSError)) and _PEER_GONE.search(str(error)):
            kind = "peer"
        return cls(rank, kind, one_sentence(error, hint), log, time.time())

    def write(self, folder: Path) -> None:
        """Leave the report where the launcher and the other ranks find it, all at once."""
        path = folder / f"report_{self.rank}.json"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(self)))
        temporary.replace(path)


def crash_log(folder: Path, rank: int) -> Path:
    """Return the file in which a rank that a library's fault ends leaves its stacks.

    Args:
        folder: that the ranks of this machine share.
        rank: of the whole job.
    """
    return folder / f"crash_{rank}.txt"


def read_reports(folder: Path) -> dict[int, Report]:
    """Return every report in ``folder`` by rank."""
    found = (Report(**json.loads(path.read_text())) for path in folder.glob("report_*.json"))
    return {report.rank: report for report in found}


@dataclass(frozen=True)
class Exit:
    """How one rank's process ended: exit code (negative: a signal) and when it was noticed."""

    code: int
    at: float


@dataclass(frozen=True)
class Reason:
    """Why the run failed.

    Attributes:
        sentence: for the user.
        log: the file with the traceback, empty if there is none.
        waits: who waits for whom; ``None`` where no rank was lost.
    """

    sentence: str
    log: str = ""
    waits: WhoWaits | None = None


def explain(
    world: int,
    exits: Mapping[int, Exit],
    reports: Mapping[int, Report],
    evidence: Evidence | None = None,
) -> Reason:
    """Name the rank that failed first, and why.

    Args:
        world: ranks that were started.
        exits: the ranks that did not end with exit code 0.
        reports: what ranks left behind.
        evidence: where they were, and what they waited in.

    >>> explain(2, {1: Exit(-9, 0.0)}, {}).sentence
    'rank 1 was killed by SIGKILL; the other rank was ended'
    """
    fates = evidence.fates if evidence else {}
    killed = _killed({r: end for r, end in exits.items() if r not in fates}, reports)
    own = sorted((r for r in reports.values() if r.kind in ("job", "error")), key=lambda r: r.at)
    # NCCL's watchdog aborts a rank that waited in vain: a reason only where there is no other.
    aborted = {rank for rank in killed if exits[rank].code == -signal.SIGABRT}
    if own or fates or len(aborted) < len(killed):
        killed = {rank: what for rank, what in killed.items() if rank not in aborted}
    if killed:
        return _lost(world, evidence, killed)
    if own:
        same = [report for report in own if report.message == own[0].message]
        return Reason(_failed(world, same), same[0].log)
    if fates:
        return _lost(world, evidence, fates)
    told = sorted(rank for rank, report in reports.items() if report.kind == "signal")
    if told:
        return Reason(f"{_ranks(told)} {_was(told)} ended by SIGTERM{_others(world, len(told))}")
    by_itself = sorted(r for r, end in exits.items() if end.code > 0 and r not in reports)
    if by_itself:
        code = exits[by_itself[0]].code
        who = _ranks(by_itself)
        return Reason(f"{who} ended with exit code {code}{_others(world, len(by_itself))}")
    return _only_peers(world, exits, reports, evidence)


def _killed(exits: Mapping[int, Exit], reports: Mapping[int, Report]) -> dict[int, str]:
    """Ranks that a signal ended first, and which; SIGTERM is how the launcher ends the rest."""
    moments = [report.at for report in reports.values()] + [end.at for end in exits.values()]
    limit = min(moments, default=0.0) + _SAME_MOMENT_S
    return {
        rank: f"was killed by {_signal_name(-end.code)}"
        for rank, end in sorted(exits.items())
        if end.code < 0 and end.code != -signal.SIGTERM and end.at <= limit
    }


def _lost(world: int, evidence: Evidence | None, lost: Mapping[int, str], log: str = "") -> Reason:
    """The sentence of ranks that no longer answer: what became of them, where, who waited."""
    ranks, waits = sorted(lost), evidence.about(lost) if evidence else None
    fates = sorted(set(lost.values()))
    what = " and ".join([fates[0], *(fate.removeprefix("was killed by ") for fate in fates[1:])])
    if len(ranks) > 1:
        what = re.sub("^was ", "were ", what)
    sentence = f"{_ranks(ranks)} {what}"
    if waits:
        waited = waits.waited()
        sentence += waits.where(ranks) + (f"; {waited}" if waited else "")
    return Reason(sentence + _others(world, len(ranks)), log, waits)


def _failed(world: int, same: list[Report]) -> str:
    """The sentence of ``same``: reports with one message, the earliest first."""
    message, ranks = same[0].message, sorted(report.rank for report in same)
    if same[0].kind == "job" and (len(ranks) > 1 or world == 1 or ranks == [0]):
        return message
    if len(ranks) == world:
        who = "the only rank" if world == 1 else f"all {world} ranks"
        return f"{who} failed: {message}"
    return f"{_ranks(ranks)} failed: {message}{_others(world, len(ranks))}"


def _only_peers(
    world: int, exits: Mapping[int, Exit], reports: Mapping[int, Report], evidence: Evidence | None
) -> Reason:
    """Every rank that says something waited for another one: name those that say nothing."""
    # A rank with a dump still ran when its peers gave up.
    dumped = evidence.dumps if evidence else {}
    early = sorted(set(range(world)) - {*exits, *reports, *dumped}) if exits else []
    if early:
        return Reason(f"{_ranks(early)} ended too early{_others(world, len(early))}")
    if not reports:
        return Reason("the ranks were ended by SIGTERM")
    first = min(reports.values(), key=lambda report: report.at)
    waited_for = evidence.about({}).lost if evidence else []
    silent = waited_for or sorted(set(range(world)) - set(reports))
    if silent and len(silent) < world / 2:
        return _lost(world, evidence, dict.fromkeys(silent, "stopped answering"), first.log)
    lost = f"rank {first.rank} waited in vain for another rank"
    return Reason(f"{lost}{_others(world, 1)}", first.log)


def _ranks(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    return f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"


def _was(ranks: list[int]) -> str:
    return "was" if len(ranks) == 1 else "were"


def _others(world: int, named: int) -> str:
    rest = world - named
    if rest <= 0:
        return ""
    return "; the other rank was ended" if rest == 1 else f"; the other {rest} ranks were ended"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
