# SPDX-License-Identifier: Apache-2.0
"""Tasks on ranks: one launch per world size, and a new one when a task brings it down.

A task that crashes or hangs has a result with the reason; the tasks after it run in a fresh launch.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from campaigns.command import failure
from campaigns.ranks import LaunchFailed, Ranks
from campaigns.record import Result

_POLL_S = 0.1
# Importing everything on 8 ranks of 2 busy cores; a task's own deadline starts afterwards.
_START_S = 300.0

Launch = Callable[..., Iterator[tuple[str, str, Result]]]


class Tell:
    """How rank 0 of a launch tells what it does; whole lines, on disk at once. Others say nothing.

    Args:
        path: of the file.
        rank: this one.
    """

    def __init__(self, path: Path, rank: int) -> None:
        self._path, self._leads = path, rank == 0

    def started(self, task: str) -> None:
        """A task begins."""
        self._write("started", task, {})

    def part(self, task: str, result: Result) -> None:
        """A part of a task's result is there."""
        self._write("part", task, result)

    def finished(self, task: str, result: Result) -> None:
        """A task has its result."""
        self._write("finished", task, result)

    def _write(self, *record: Any) -> None:
        if not self._leads:
            return
        with self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())


class Told:
    """The command's side: every record once; a line that is not finished is not there yet."""

    def __init__(self, path: Path) -> None:
        self._path, self._read = path, 0

    def new(self) -> list[tuple[str, str, Result]]:
        """Return the records since the last call: (event, task, result)."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._read)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._read += len(whole)
        return [tuple(json.loads(line)) for line in whole.splitlines()]


def launch(
    world: int, tasks: Sequence[str], work: str, plan: Any, folder: Path, *,
    backend: str = "auto", timeout: float = 180.0,
) -> Iterator[tuple[str, str, Result]]:  # fmt: skip
    """Start ranks that do tasks; yield what they tell as it happens.

    Args:
        world: number of ranks.
        tasks: names.
        work: ``"module:function"``, called on every rank with ``(tell, tasks, plan)``.
        plan: what the function needs; plain values.
        folder: for what ranks print and tell.
        backend: of the process group; ``"auto"`` takes NCCL where there is a GPU per rank.
        timeout: seconds after which a task without a result is ended.

    Raises:
        LaunchFailed: a rank ended early, or nothing happened for too long; one sentence.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "told.jsonl"
    path.unlink(missing_ok=True)
    told, limit = Told(path), _START_S
    deadline = time.monotonic() + limit
    arguments = (str(path), work, list(tasks), plan)
    with Ranks(world, f"{__name__}:on_rank", *arguments, backend=backend, logs=folder) as ranks:
        while True:
            try:
                ended, broken = ranks.wait(_POLL_S), None
            except LaunchFailed as error:
                ended, broken = True, error
            if new := told.new():
                limit = timeout
                deadline = time.monotonic() + limit
            yield from new
            if broken is not None:
                raise broken
            if ended:
                return
            if time.monotonic() > deadline:
                raise LaunchFailed(f"no result within {limit:g} s; all ranks were ended")


def on_rank(path: str, work: str, tasks: list[str], plan: Any) -> None:
    """What a rank of :func:`launch` does."""
    import torch.distributed as dist

    from campaigns.ranks import function_of

    function_of(work)(Tell(Path(path), dist.get_rank()), tasks, plan)


def run_tasks(
    world: int, tasks: Sequence[str], work: str, plan: Any, folder: Path, *,
    note: Callable[[str], None], start: Launch = launch,
    on_part: Callable[[str, Result], None] | None = None, **options: Any,
) -> Iterator[tuple[str, Result]]:  # fmt: skip
    """Launch until every task has a result or a reason; yield (task, result) as they end.

    Args:
        world, tasks, work, plan, folder: as of :func:`launch`.
        note: called with a sentence for what is no task.
        start: makes a launch; tests put their own in.
        on_part: called with the parts of results.
        options: of :func:`launch`.
    """
    left = list(tasks)
    while left:
        note(f"starting {world} rank{'s' if world > 1 else ''} for {len(left)} runs")
        current, began, reason = "", time.monotonic(), ""
        before = list(left)
        try:
            for event, task, result in start(world, left, work, plan, folder, **options):
                if event == "started":
                    current, began = task, time.monotonic()
                elif event == "part":
                    on_part(task, result)
                else:
                    current = ""
                    left = [each for each in left if each != task]
                    yield task, result
        except LaunchFailed as error:
            reason = str(error)
            note(f"the launch of {world} ended early: {reason}")
        # Without a task to blame the next launch would end the same way, so all are lost.
        lost = [current] if current and reason else left if left == before or not reason else []
        for task in lost:
            yield task, failure(
                reason or "the launch ended without running it", time.monotonic() - began
            )
        left = [each for each in left if each not in lost]
