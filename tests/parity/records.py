# SPDX-License-Identifier: Apache-2.0
"""Files by which the ranks of a launch tell the runner where they are. No torch.

``plan.json`` says what to do; rank 0 appends a line to ``progress.jsonl`` when it starts and when
it finishes an item. A line that is not finished yet is not there yet.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Plan:
    """One launch.

    Attributes:
        world_size: its ranks.
        items: names of rows, or of references where the world has one rank.
        nightly: names are looked up in the nightly table.
        micro_batches, steps, thresh: the options of the same names.
        backend: of the process groups, or ``"auto"``.
        references: folder of the references' files.
        timeout: seconds after which a collective has failed.
    """

    world_size: int
    items: tuple[str, ...]
    nightly: bool
    micro_batches: int
    steps: int
    thresh: float
    backend: str
    references: str
    timeout: int

    def write(self, path: Path) -> None:
        """Leave the plan for the ranks."""
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Plan:
        """The plan in a file."""
        values = json.loads(path.read_text())
        return cls(**{**values, "items": tuple(values["items"])})


class ProgressWriter:
    """Rank 0's side; whole lines, on disk as soon as they are written."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def started(self, item: str) -> None:
        """An item begins."""
        self._write({"started": item})

    def finished(self, item: str, result: dict[str, Any]) -> None:
        """An item has its result."""
        self._write({"finished": item, "result": result})

    def _write(self, record: dict[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())


class ProgressReader:
    """The runner's side: every record once."""

    def __init__(self, path: Path) -> None:
        self._path, self._read = path, 0

    def new(self) -> list[dict[str, Any]]:
        """Records since the last call."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._read)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._read += len(whole)
        return [json.loads(line) for line in whole.splitlines()]
