# SPDX-License-Identifier: Apache-2.0
"""Files in which each rank of a launch tells the supervising pytest what happened.

One directory per launch:

    plan.json          node ids to run, in order (written by the supervisor)
    rank3.jsonl        one JSON object per line, appended and flushed as things happen
    rank3.stacks       stacks of all threads at a deadline, a SIGTERM or a crash
    logs/, agent.log   output of the ranks and of torchrun
"""

from __future__ import annotations

import json
import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

PLAN = "plan.json"
DIRECTORY_VARIABLE = "MIMO_TEST_RECORDS"
SUPERVISOR_VARIABLE = "MIMO_TEST_SUPERVISOR_PID"

# From the frame that called the test function, or reported on it, down to the first one.
_PYTEST_FRAMES = re.compile(
    r'\n  File "[^"]*_pytest/(python\.py", line \d+ in pytest_pyfunc_call|runner\.py").*', re.DOTALL
)
# How the interpreter's account of a crash begins, and the list of modules that ends it.
_CRASH = "Fatal Python error: "
_MODULES = "\nExtension modules: "
# What PyTorch prints of each thread of a process that such a signal ends, and in whose stack it is.
_NATIVE = re.compile(r"^SIG[A-Z]+\(\d+\), PID: \d+, Thread \d+:", re.MULTILINE)
_CAUSE = "FatalSignalHandler::fatalSignalHandler"


def stacks_path(directory: Path, rank: int) -> Path:
    """Return the file that receives a rank's stacks when it is stopped from outside."""
    return directory / f"rank{rank}.stacks"


def _lines_path(directory: Path, rank: int) -> Path:
    return directory / f"rank{rank}.jsonl"


class RecordWriter:
    """Appends one rank's records; every record is on disk when ``write`` returns."""

    def __init__(self, directory: Path, rank: int) -> None:
        self._file = _lines_path(directory, rank).open("a", encoding="utf-8")

    def write(self, kind: str, **fields: Any) -> None:
        """Append a record of this ``kind`` with the time it was written."""
        self._file.write(json.dumps({"kind": kind, "time": time.time(), **fields}) + "\n")
        self._file.flush()


@dataclass
class RankLog:
    """What one rank has told so far; ``read`` brings it up to date."""

    directory: Path
    rank: int
    pid: int | None = None
    started: set[str] = field(default_factory=set)
    finished: set[str] = field(default_factory=set)
    reports: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    failed_at: dict[str, float] = field(default_factory=dict)
    gave_up: bool = False
    ended: bool = False
    _offset: int = 0

    def read(self) -> bool:
        """Read records appended since the last call; True when there were any."""
        path = _lines_path(self.directory, self.rank)
        if not path.exists():
            return False
        with path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        # A line without its newline is still being written.
        complete = data[: data.rfind(b"\n") + 1]
        self._offset += len(complete)
        for line in complete.splitlines():
            self._take(json.loads(line))
        return bool(complete)

    def _take(self, record: dict[str, Any]) -> None:
        kind, test = record["kind"], record.get("test", "")
        if kind == "pid":
            self.pid = record["pid"]
        elif kind == "start":
            self.started.add(test)
        elif kind == "report":
            self.reports.setdefault(test, []).append(record["report"])
            if record["report"]["outcome"] == "failed":
                self.failed_at.setdefault(test, record["time"])
        elif kind == "finish":
            self.finished.add(test)
        elif kind == "gave_up":
            self.gave_up = True
        elif kind == "end":
            self.ended = True

    def stacks(self) -> str:
        """Return the stacks the rank left when it was stopped, or an empty string."""
        path = stacks_path(self.directory, self.rank)
        return trim_stacks(path.read_text(errors="replace")) if path.exists() else ""

    def output_tail(self, lines: int = 40) -> str:
        """Return the last lines the rank printed, both streams; after a crash those around it."""
        texts = []
        for path in sorted((self.directory / "logs").rglob(f"{self.rank}/std*.log")):
            text = path.read_text(errors="replace")
            before, fatal, stacks = text.partition(_CRASH)
            if fatal:
                before, *native = _NATIVE.split(before)
                said = before.splitlines()[-lines // 4 :]
                for frames in native:
                    if _CAUSE in frames:
                        said += ["the thread that it ended, libraries' frames:"]
                        # The innermost come first; below the handler's own two.
                        said += frames.strip().splitlines()[2 : lines // 2]
                stacks = trim_stacks(fatal + stacks.partition(_MODULES)[0]).splitlines()
                texts += [*said, *stacks[: lines - len(said)]]
            else:
                texts += text.splitlines()[-lines:]
        return "\n".join(texts[-lines:])


def trim_stacks(text: str) -> str:
    """Drop what says nothing about the test: the harness's own thread and pytest's frames."""
    threads = re.split(r"\n(?=(?:Current thread|Thread) )", text.strip())
    kept = [t for t in threads if "programs.py" not in t or "in watch" not in t]
    return "\n".join(_PYTEST_FRAMES.sub("", t).strip() for t in kept)


def write_plan(directory: Path, nodeids: list[str]) -> None:
    """Write the node ids a launch has to run, in order."""
    (directory / PLAN).write_text(json.dumps(nodeids), encoding="utf-8")


def planned(items: list[pytest.Item], plan: list[str], who: str) -> list[pytest.Item]:
    """Return a plan's tests in its order.

    Raises:
        pytest.UsageError: ``who`` has not collected one of them.
    """
    by_id = {item.nodeid: item for item in items}
    missing = [nodeid for nodeid in plan if nodeid not in by_id]
    if missing:
        raise pytest.UsageError(
            f"{who} did not collect {missing[0]!r}: a test's id has to be the same in every "
            "process (no sets, addresses or random values in parameters)"
        )
    return [by_id[nodeid] for nodeid in plan]


def read_plan() -> tuple[Path | None, list[str] | None]:
    """Return the records directory and plan of the launch this process is part of, if any."""
    value = os.environ.get(DIRECTORY_VARIABLE)
    if value is None:
        return None, None
    directory = Path(value)
    return directory, json.loads((directory / PLAN).read_text(encoding="utf-8"))
