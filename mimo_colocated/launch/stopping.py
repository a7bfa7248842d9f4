# SPDX-License-Identifier: Apache-2.0
"""SIGTERM and SIGUSR1 of the launcher and of the ranks: what each does when it is told to stop.

A job that can stop goes on to the end of its step and saves (``mimo_colocated/stop_requests.py``).
Any other, and a rank whose peers are lost, ends at once, but not without a word.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimo_colocated.forensics.evidence import kill
from mimo_colocated.launch.errors import Stopped
from mimo_colocated.launch.failures import Report, read_reports
from mimo_colocated.phases import Place, read_places
from mimo_colocated.stop_requests import EXIT_CODE, StopRequests, end_by

if TYPE_CHECKING:
    pass

_POLL_S = 0.1


class RankSignals:
    """One rank's side.

    Args:
        rank: this one.
        stops: the job stops when it is told to; one that does not is ended.
        say: says why ranks end when others of this host are lost; ``None``: the launcher does.
    """

    def __init__(self, rank: int, *, stops: bool, say: Callable[[], None] | None) -> None:
        self.watch: Any = None  # a RankWatch, where there is one
        self._rank, self._stops, self._say = rank, stops, say
        self._ending = threading.Event()
        # Last: a signal may be there at once, and finds everything in its place.
        self.requests = StopRequests(self._received).install()

    def ends_by_itself(self) -> None:
        """Leave it to this rank to end and to say why; a launcher's SIGTERM waits for it."""
        self._ending.set()

    def stopped(self, stop: Stopped) -> int:
        """Wait for all ranks to have saved, say it on rank 0, and return the exit code."""
        import torch.distributed as dist

        self.ends_by_itself()
        if dist.is_initialized():
            dist.barrier()
        if self._rank == 0:
            print(stop, flush=True)
        return EXIT_CODE

    def _received(self, sent: signal.Signals, again: bool) -> bool:
        if self._ending.is_set():
            return True
        if sent is not signal.SIGTERM:
            return False if self._stops else end_by(sent)
        if self._others_ended():  # the launcher ends the rest
            if self.watch.told_to_end() and self._say is not None:
                self._say()
        elif self._stops and not again:
            return False
        elif self.watch is not None:
            with contextlib.suppress(OSError):
                report = Report(self._rank, "signal", "ended by SIGTERM", "", time.time())
                report.write(self.watch.folder)
        return end_by(sent)

    def _others_ended(self) -> bool:
        """Another rank of this host failed or is gone."""
        if self.watch is None:
            return False
        places = read_places(self.watch.folder, past=False).values()
        gone = any(not place.process_state() for place in places)
        return gone or bool(read_reports(self.watch.folder))


class Forwarding(threading.Thread):
    """The launcher's side: passes on to its ranks what it receives; a second SIGTERM kills them.

    PyTorch's agent would give them 30 s and then kill them, in the middle of a save or not.

    Args:
        stops: the job stops when it is told to; the ranks of one that does not end at once.
    """

    def __init__(self, stops: bool) -> None:
        super().__init__(daemon=True, name="forwarding")
        self._stops, self._killed = stops, False
        self._news, self._over = threading.Event(), threading.Event()
        self._received_so_far: list[signal.Signals] = []
        self._folder: Any = None  # a path, set before the thread starts
        self._requests = StopRequests(self._received).install()

    def into(self, folder: Path) -> None:
        """Begin to pass on, to the ranks that keep their phases in ``folder``."""
        self._folder = folder
        self.start()

    def _received(self, sent: signal.Signals, again: bool) -> bool:
        self._killed = self._killed or again
        self._received_so_far.append(sent)
        self._news.set()
        return again

    def run(self) -> None:
        """Pass on, to ranks that start later, too, until the ranks have ended."""
        told: set[tuple[int, int]] = set()
        self._news.wait()
        while not self._over.wait(_POLL_S):
            # A rank receives signals before it keeps its phase.
            for rank, place in read_places(self._folder, past=False).items():
                received = list(self._received_so_far)
                for number, sent in enumerate(received):
                    if (rank, number) not in told:
                        _send(place, sent)
                        told.add((rank, number))
                if self._killed:
                    kill(place)

    def close(self) -> None:
        """End, after the ranks."""
        self._over.set()
        self._news.set()
        self._requests.close()

    def outcome(self, codes: set[int]) -> tuple[str, int] | None:
        """Return what to say and the exit code, if the ranks were told to end.

        Args:
            codes: the exit codes by which they ended.
        """
        if EXIT_CODE in codes:
            return "", EXIT_CODE  # after all had saved, which rank 0 said
        if not self._received_so_far or (self._stops and not self._killed):
            return None
        sent = max(self._received_so_far)
        second = "a second " if self._stops else ""
        return f"stopped by {second}{sent.name}; all ranks were ended", 128 + sent


def _send(place: Place, sent: signal.Signals) -> None:
    if place.process_state():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(place.pid, sent)
