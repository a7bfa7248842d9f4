# SPDX-License-Identifier: Apache-2.0
"""Starts the digits job, its launcher forked from this process, which has the libraries.

Importing PyTorch and Megatron-Core takes longer than all that a case is about. The launcher and the
job are the real ones.
"""

from __future__ import annotations

import gc
import importlib
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import psutil

from mimo_colocated.launch import run
from tests.faults.cases import Case
from tests.faults.inject import watch_rank

# Imported late: faults are listed and judged without torch.
_TRAIN = "examples.mimo.digits.train"
_LIBRARIES = (_TRAIN, "megatron.core.models.mimo.job.layout_plot")
LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
"""Of an outer launch; a job that is started must not take itself for one of its ranks."""


def prepare() -> None:
    """Import what every start needs; before anything makes threads."""
    os.environ.update(OMP_NUM_THREADS="1", TORCHDYNAMO_DISABLE="1", CUDA_VISIBLE_DEVICES="")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # as the launcher does for its ranks
    for name in _LIBRARIES:
        importlib.import_module(name)
    importlib.import_module(_TRAIN).prepare()
    gc.freeze()


@dataclass(frozen=True)
class Ended:
    """How a start ended.

    Attributes:
        code: exit code of the launcher; ``None`` if it had to be killed.
        at: when, on the monotonic clock.
        errors: what was written to stderr.
        output: what was written to stdout.
        left: processes that were still there a moment later.
    """

    code: int | None
    at: float
    errors: str
    left: list[str]
    output: str = ""


def start(arguments: Sequence[str], folder: Path, case: Case | None, deadline_s: float) -> Ended:
    """Run the job to its end.

    Args:
        arguments: of the job, ``--out`` among them.
        folder: for the journal and what the job prints; it is there.
        case: the fault, if any.
        deadline_s: the launcher is killed after so many seconds.
    """
    pid = os.fork()
    if pid == 0:
        _become_the_launcher(arguments, folder, case)
    deadline, status = time.monotonic() + deadline_s, None
    while status is None and time.monotonic() < deadline:
        done, found = os.waitpid(pid, os.WNOHANG)
        status = os.waitstatus_to_exitcode(found) if done else None
        time.sleep(0.02)
    ended = time.monotonic()
    left = _left_behind(pid)
    if status is None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    errors, output = ((folder / name).read_text() for name in ("stderr", "stdout"))
    return Ended(status, ended, errors, left, output)


def launch(arguments: Sequence[str], first_in_rank: Callable[[int], object]) -> int:
    """Be the job's launcher, after :func:`prepare`; returns its exit code.

    Args:
        arguments: of the job.
        first_in_rank: called in each rank's process before the job, with the rank.
    """
    train = importlib.import_module(_TRAIN)

    def parse(argv: Sequence[str], world_size: int | None) -> Any:
        if world_size is not None:
            first_in_rank(int(os.environ["RANK"]))
        return train.JOB.parse(argv, world_size)

    return run(replace(train.JOB, parse=parse), arguments)


def _become_the_launcher(arguments: Sequence[str], folder: Path, case: Case | None) -> NoReturn:
    code = 1
    try:
        os.setsid()
        for number, name in ((1, "stdout"), (2, "stderr")):
            file = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, number)
        for name in LAUNCH_VARIABLES:
            os.environ.pop(name, None)
        code = launch(arguments, lambda rank: watch_rank(rank, folder, case))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _left_behind(session: int, patience_s: float = 5.0) -> list[str]:
    """Processes of a start that do not end; they are killed."""
    deadline = time.monotonic() + patience_s
    while (found := _alive(session)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in found:
        process.kill()
    return [f"{process.pid}" for process in found]


def _alive(session: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            member = os.getsid(process.pid) == session and process.pid != session
            if member and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, ProcessLookupError):
            continue
    return found
