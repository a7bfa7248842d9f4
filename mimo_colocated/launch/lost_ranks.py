# SPDX-License-Identifier: Apache-2.0
"""A rank that is killed or stopped: its peers save what they know, and nobody is left behind.

Every rank keeps its phase in a file of the report folder and PyTorch's flight recorder runs. When
a rank is lost, the others save their recorder's dumps below ``OUT/errors/flight_recorder``; the
launcher, or under torchrun the first rank that gets to it, reads them and says who waited for whom.
A stopped rank does not end by itself: it is killed once its peers have given up on it.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path

from mimo_colocated import phases
from mimo_colocated.forensics.evidence import (
    DUMP,
    STOPPED,
    SUMMARY,
    Evidence,
    kill,
    stopped_ranks,
)
from mimo_colocated.launch.failures import Reason, read_reports
from mimo_colocated.phases import read_places

_POLL_S = 0.2
# Peers of a lost rank save their dumps within this time, or never.
_DUMPS_S = 5.0
# After the first sign ranks have this long to end; what then still runs is stuck.
_ENDING_S = 10.0


def dump_folder(out: Path) -> Path:
    """Return where flight recorder dumps of a job go."""
    return out / "errors" / "flight_recorder"


def peers_gave_up(folder: Path) -> list[int]:
    """Return ranks that reported that another one no longer answers; none if one gave a reason."""
    reports = read_reports(folder)
    if any(report.kind in ("job", "error") for report in reports.values()):
        return []
    return sorted(rank for rank, report in reports.items() if report.kind == "peer")


class RankWatch:
    """One rank's side; makes its files.

    Args:
        rank: this one.
        folder: of the reports and phases, shared by the ranks of this host.
    """

    def __init__(self, rank: int, folder: Path) -> None:
        self.rank, self.folder = rank, folder
        self.dumps: Path | None = None
        self._recorder = None
        phases.record_into(folder, rank)

    def start(self, out: Path) -> None:
        """Switch the flight recorder on; before the first process group is made."""
        from mimo_colocated.forensics import flight_recorder

        self.dumps = dump_folder(out)
        with contextlib.suppress(OSError):
            (self.dumps / DUMP.format(rank=self.rank)).unlink(missing_ok=True)
            if self.rank == 0:
                (self.dumps / SUMMARY).unlink(missing_ok=True)
        flight_recorder.switch_on(self.dumps)
        self._recorder = flight_recorder.Watch(
            self.dumps, self.rank, lambda: bool(peers_gave_up(self.folder))
        )
        self._recorder.start()

    def save(self) -> None:
        """Save the flight recorder's dump."""
        if self._recorder is not None:
            self._recorder.save()

    def told_to_end(self) -> bool:
        """Save the dump, when this host's agent ends its ranks; return whether a rank was lost."""
        lost = bool(self._gone() or peers_gave_up(self.folder))
        if lost and self._recorder is not None:
            self._recorder.settle()
            self._recorder.save()
        return lost

    def evidence(self) -> Evidence:
        """Return what the ranks of this host left, once they had time to; kill stopped ones."""
        deadline = time.monotonic() + _DUMPS_S
        while self._dumps_missing() and time.monotonic() < deadline:
            time.sleep(_POLL_S / 4)
        places = read_places(self.folder, past=False)
        fates = dict.fromkeys(self._gone(), "died") | dict.fromkeys(stopped_ranks(places), STOPPED)
        evidence = Evidence.read(
            self.folder, self.dumps or self.folder, fates, peers_gave_up(self.folder)
        )
        for rank in stopped_ranks(places):
            kill(places[rank])
        return evidence

    def _gone(self) -> list[int]:
        """Ranks whose process ended without a report and without a dump."""
        reports = read_reports(self.folder)
        return [
            rank
            for rank, place in sorted(read_places(self.folder, past=False).items())
            if not place.process_state() and rank not in reports and not self._has_dump(rank)
        ]

    def _has_dump(self, rank: int) -> bool:
        return self.dumps is not None and (self.dumps / DUMP.format(rank=rank)).exists()

    def _dumps_missing(self) -> bool:
        return any(
            place.process_state() not in ("", "T") and not self._has_dump(rank)
            for rank, place in read_places(self.folder, past=False).items()
        )


class Reaper(threading.Thread):
    """The launcher's side: kills ranks that are stopped once their peers have given up.

    Args:
        folder: of the reports and phases.

    Attributes:
        fates: rank -> what became of it, of those that it had to kill.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True, name="reaper")
        self.fates: dict[int, str] = {}
        self._folder, self._over = folder, threading.Event()

    def run(self) -> None:
        """Look, until the ranks have ended."""
        trouble: float | None = None
        while not self._over.wait(_POLL_S):
            places = read_places(self._folder, past=False)
            if trouble is None:
                gone = any(not place.process_state() for place in places.values())
                if not gone and not any(self._folder.glob("report_*.json")):
                    continue
                trouble = time.monotonic()
            late = time.monotonic() - trouble
            for rank in stopped_ranks(places) if late > 2 * _POLL_S else ():
                self._kill(rank, places, STOPPED)
            for rank in places if late > _ENDING_S else ():
                if places[rank].process_state():
                    self._kill(rank, places, "stopped answering")

    def _kill(self, rank: int, places: dict[int, phases.Place], fate: str) -> None:
        self.fates.setdefault(rank, fate)
        kill(places[rank])

    def close(self) -> None:
        """End, after the ranks."""
        self._over.set()
        self.join()


def write_summary(reason: Reason, folder: Path) -> str:
    """Write who waits for whom beside the dumps; return where, empty if there is nothing."""
    if reason.waits is None:
        return ""
    path = folder / SUMMARY
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{reason.sentence}.\n\n{reason.waits.text()}\n")
    except OSError:
        return ""
    return str(path)


def claim(folder: Path) -> bool:
    """Return whether this process is the first of the host to say what went wrong."""
    try:
        os.close(os.open(folder / "said", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    except OSError:  # a full disk: said several times is better than never
        pass
    return True
