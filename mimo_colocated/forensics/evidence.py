# SPDX-License-Identifier: Apache-2.0
"""What a failure left behind: phases, flight-recorder dumps, processes that are stopped or gone.

Pure, so that a launcher reads it without loading torch.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import re
import signal
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from mimo_colocated.forensics.who_waits import WhoWaits
from mimo_colocated.phases import Place, read_places

DUMP = "rank_{rank}"
"""File name of a rank's dump; those that NCCL's watchdog writes begin with ``nccl_``."""
SUMMARY = "summary.txt"
"""Who waits for whom, beside the dumps."""
STOPPED = "was stopped (SIGSTOP)"

_DUMPS = re.compile(r"(?:nccl_)?rank_(\d+)")


@dataclass(frozen=True)
class Evidence:
    """What is known of the ranks of a job that failed.

    Attributes:
        places: rank -> where it was; ranks of this host.
        dumps: rank -> its flight recorder's dump.
        fates: rank -> what became of it, of those that went without a word (:data:`STOPPED`).
        gave_up: ranks that ended because another one no longer answered.
    """

    places: Mapping[int, Place] = field(default_factory=dict)
    dumps: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    fates: Mapping[int, str] = field(default_factory=dict)
    gave_up: frozenset[int] = frozenset()

    @classmethod
    def read(
        cls,
        places: Path,
        dumps: Path,
        fates: Mapping[int, str] | None = None,
        gave_up: Iterable[int] = (),
    ) -> Evidence:
        """Return all that stands in the two folders."""
        return cls(read_places(places), read_dumps(dumps), fates or {}, frozenset(gave_up))

    def about(self, culprits: Mapping[int, str]) -> WhoWaits:
        """Return who waits for whom, with these ranks lost: rank -> what became of it."""
        return WhoWaits(culprits, self.places, self.dumps, self.gave_up)


def read_dumps(folder: Path) -> dict[int, dict[str, Any]]:
    """Return rank -> its dump below ``folder``; NCCL's watchdog's only where no other is."""
    found: dict[int, dict[str, Any]] = {}
    for path in sorted(folder.glob("*rank_*")):
        match = _DUMPS.fullmatch(path.name)
        if match is None:
            continue
        # What is cut short (a full disk, a rank that was killed) tells nothing.
        with contextlib.suppress(OSError, EOFError, ValueError, pickle.UnpicklingError):
            rank, dump = int(match[1]), _PlainUnpickler(io.BytesIO(path.read_bytes())).load()
            if path.name.startswith("rank_") or rank not in found:
                found[rank] = dump
    return found


class _PlainUnpickler(pickle.Unpickler):
    """Reads dictionaries, lists, numbers and text; a file that asks for more is refused."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"a flight recorder's dump holds no {module}.{name}")


def clear_dumps(folder: Path) -> None:
    """Remove an earlier failure's dumps and summary."""
    for path in folder.glob("*") if folder.is_dir() else ():
        if _DUMPS.fullmatch(path.name) or path.name == SUMMARY:
            path.unlink(missing_ok=True)


def stopped_ranks(places: Mapping[int, Place]) -> list[int]:
    """Return the ranks of this host whose process is stopped: it will not end by itself."""
    return [rank for rank, place in sorted(places.items()) if place.process_state() == "T"]


def kill(place: Place) -> None:
    """Send SIGKILL to a rank's process, which reaches a stopped one, too."""
    if place.process_state():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(place.pid, signal.SIGKILL)
