# SPDX-License-Identifier: Apache-2.0
"""What each rank did, line by line in a file: the truth that the job's message is held against.

A line is written before the thing happens: ``phase``, ``step`` and ``microbatch`` of a mark, the
ranks of a collective, the fault itself. No torch.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections import defaultdict
from functools import cached_property
from pathlib import Path
from typing import Any

from mimo_colocated import phases

Events = dict[int, list[dict[str, Any]]]


class Journal:
    """Of one rank, being written."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._file = os.open(folder / f"{rank}.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def write(self, **event: Any) -> None:
        """One line, at once and in one piece."""
        line = json.dumps({"at": time.monotonic(), **event}) + "\n"
        os.write(self._file, line.encode())


def read(folder: Path, rank: int) -> list[dict[str, Any]]:
    """The lines of a rank; none if it did not get as far."""
    path = folder / f"{rank}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Control:
    """What the ranks did in runs without faults.

    Args:
        events: rank -> its lines, of a run that trains.
        resumed: the same of a run that resumes; read for the loading of checkpoints.
    """

    def __init__(self, events: Events, resumed: Events) -> None:
        self._events, self._resumed = events, resumed

    def ranks(self) -> list[int]:
        """All ranks."""
        return sorted(self._events)

    def phases(self) -> set[str]:
        """Phases that were marked on some rank."""
        return {phase for stays in self._stays.values() for phase in stays}

    def entries(self, rank: int, phase: str) -> int:
        """How often a rank entered a phase."""
        return len(self._stays[rank].get(phase, ()))

    def seconds(self, rank: int, phase: str) -> float:
        """How long a rank usually stayed in a phase."""
        return statistics.median(self._stays[rank][phase])

    def span(self, rank: int, phase: str) -> tuple[float, float]:
        """From when to when, after the rank's start: the start phase, or the whole run."""
        events = self._events[rank]
        marks = [event["at"] for event in events if "phase" in event]
        begun = events[0]["at"]
        if phase == phases.START:
            return 0.0, 0.9 * (marks[0] - begun)
        return 0.0, 0.95 * (marks[-1] - begun)

    @cached_property
    def _stays(self) -> dict[int, dict[str, list[float]]]:
        found: dict[int, dict[str, list[float]]] = {}
        for rank in self._events:
            found[rank] = defaultdict(list)
            for events, loads in ((self._events, False), (self._resumed, True)):
                marks = [event for event in events[rank] if "phase" in event]
                for event, following in zip(marks, marks[1:], strict=False):
                    if event["entered"] and (event["phase"] == phases.LOAD) is loads:
                        found[rank][event["phase"]].append(following["at"] - event["at"])
        return found
