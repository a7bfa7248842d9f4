# SPDX-License-Identifier: Apache-2.0
"""Runs the rows: one launch per world size, a new one when a row brings it down.

A row that crashes or hangs is a FAIL with its reason; the rows after it run in a fresh launch.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from tests.parity.options import Options
from tests.parity.records import Plan, ProgressReader
from tests.parity.rows import Reference, Row

_RANKS = Path(__file__).with_name("ranks.py")
_POLL_S = 0.1
# Importing everything on 8 ranks of 2 busy cores; the row's own deadline starts afterwards.
_START_S = 300.0
# The launcher ends ranks that do not listen after 30 s.
_STOP_S = 60.0
# Below the deadline of a row: the rank that waits in vain then says so itself.
_COLLECTIVE_S = 120

Result = dict[str, Any]


class LaunchFailed(Exception):
    """A launch ended before its last item; the text is the reason in one sentence."""


class Launch(Protocol):
    """One start of the ranks."""

    def records(self) -> Generator[dict[str, Any], None, None]:
        """What the ranks report, as it happens; raises :class:`LaunchFailed` at an early end."""
        ...


class RanksLaunch:
    """``plan.world_size`` ranks under the digits job's launcher, in a process of their own."""

    script = _RANKS

    def __init__(self, plan: Plan, folder: Path, row_timeout: float) -> None:
        self._folder, self._row_timeout = folder, row_timeout
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "progress.jsonl").unlink(missing_ok=True)
        plan.write(folder / "plan.json")
        self._log = folder / "launch.log"

    def records(self) -> Generator[dict[str, Any], None, None]:
        """As :class:`Launch`."""
        reader = ProgressReader(self._folder / "progress.jsonl")
        with self._process() as process:
            deadline = time.monotonic() + _START_S
            limit = _START_S
            while True:
                ended = process.poll() is not None
                new = reader.new()
                if new:
                    limit = self._row_timeout
                    deadline = time.monotonic() + limit
                yield from new
                if ended:
                    break
                if time.monotonic() > deadline:
                    raise LaunchFailed(f"no result within {limit:g} s; all ranks were ended")
                time.sleep(_POLL_S)
            if process.returncode:
                raise LaunchFailed(self._reason(process.returncode))

    @contextlib.contextmanager
    def _process(self) -> Iterator[subprocess.Popen]:
        with self._log.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, str(self.script), str(self._folder)],
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(_STOP_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()

    def _reason(self, code: int) -> str:
        """The launcher's own sentence, which names the rank."""
        lines = self._log.read_text(errors="replace").splitlines()
        said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        return said[-1] if said else f"the launch ended with exit code {code}, see {self._log}"


def _environment() -> dict[str, str]:
    """Without what a launch around this one has set."""
    mine = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {k: v for k, v in os.environ.items() if k not in mine}


Start = Callable[[Plan, Path, float], Launch]


class Runner:
    """Runs rows and tells of every result as soon as it is there.

    Args:
        options: the user's.
        tell: called with (row's name, result) for every row, in the order in which they finish.
        note: called with a sentence for what is no row: a reference, a launch.
        start: makes a launch; tests put their own in.
    """

    def __init__(
        self,
        options: Options,
        tell: Callable[[str, Result], None],
        note: Callable[[str], None],
        start: Start = RanksLaunch,
    ) -> None:
        self._options, self._tell, self._note, self._start = options, tell, note, start
        self._work = options.out / "work"
        self._references = self._work / "references"
        self._launches = 0

    def run(self, rows: Sequence[Row]) -> None:
        """All of ``rows``; every one is told of exactly once."""
        self._references.mkdir(parents=True, exist_ok=True)
        for path in self._references.glob("*.pt"):
            path.unlink()  # of other code, perhaps
        failed = self._run_references(rows)
        ready = []
        for row in rows:
            reason = failed.get(row.reference(self._options.micro_batches).name)
            if reason is None:
                ready.append(row)
            else:
                self._tell(row.name, failure(f"its reference failed: {reason}"))
        for world in sorted({row.world_size for row in ready}):
            names = [row.name for row in ready if row.world_size == world]
            self._run_items(world, names, self._tell)

    def _run_references(self, rows: Sequence[Row]) -> dict[str, str]:
        """Measure what rows are compared with; reference's name -> why it failed."""
        wanted: dict[str, Reference] = {}
        for row in rows:
            reference = row.reference(self._options.micro_batches)
            wanted.setdefault(reference.name, reference)
        failed: dict[str, str] = {}

        def tell(name: str, result: Result) -> None:
            if "reason" in result:
                failed[name] = result["reason"]
            self._note(f"{name}: {result.get('reason') or 'measured on one process'}")

        self._run_items(1, list(wanted), tell)
        return failed

    def _run_items(self, world: int, items: list[str], tell: Callable[[str, Result], None]) -> None:
        """Launch until every item has a result or a reason."""
        while items:
            done, reason = self._one_launch(world, items, tell)
            items = [item for item in items if item not in done]
            if reason is None:
                for item in items:
                    tell(item, failure("the launch ended without running it"))
                return

    def _one_launch(
        self, world: int, items: list[str], tell: Callable[[str, Result], None]
    ) -> tuple[set[str], str | None]:
        """(items that are settled, why the launch ended early or None)."""
        options = self._options
        plan = Plan(
            world_size=world,
            items=tuple(items),
            nightly=options.nightly,
            micro_batches=options.micro_batches,
            steps=options.steps,
            thresh=options.thresh,
            backend=options.backend,
            references=str(self._references),
            timeout=_COLLECTIVE_S,
        )
        self._launches += 1
        folder = self._work / f"launch-{self._launches}-ranks-{world}"
        self._note(f"starting {world} rank{'s' if world > 1 else ''} for {len(items)} runs")
        done: set[str] = set()
        current: str | None = None
        began = time.monotonic()
        launch = self._start(plan, folder, options.row_timeout)
        try:
            # Closed also when this loop is left by Ctrl-C: the ranks end before we do.
            with contextlib.closing(launch.records()) as records:
                for record in records:
                    if "started" in record:
                        current, began = record["started"], time.monotonic()
                        continue
                    current = None
                    done.add(record["finished"])
                    tell(record["finished"], record["result"])
        except LaunchFailed as error:
            self._note(f"the launch of {world} ended early: {error}")
            lost = [current] if current else []
            if not lost and not done:  # the next launch would end the same way
                lost = items
            for item in lost:
                tell(item, failure(str(error), time.monotonic() - began))
            return done.union(lost), str(error)
        return done, None


def failure(reason: str, seconds: float = 0.0) -> Result:
    """The result of a row that has none of its own."""
    return {"passed": False, "reason": reason, "checks": [], "seconds": round(seconds, 2)}
