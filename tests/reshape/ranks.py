# SPDX-License-Identifier: Apache-2.0
"""The ranks of one launch, as processes that are forked from one that has imported everything.

Importing PyTorch and Megatron-Core takes seconds of a core; forking takes milliseconds. The
process that is forked from (multiprocessing's fork server) never touches a GPU or a process group.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import importlib
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

# The digits come with scikit-learn, whose import takes longer than a small run trains.
_PRELOAD = ["tests.reshape.worker", "tests.harness.backend", "sklearn.datasets"]
# Longer than any collective of these small models waits on a busy machine.
_TIMEOUT_S = 180


class LaunchFailed(RuntimeError):
    """A rank ended before it was done; the message says which and how."""


class Ranks:
    """``world`` running processes with one process group; end them with :meth:`kill`.

    What they print goes to files that end with them: what counts is in their results and errors.

    Args:
        world: number of ranks.
        function: what each does, called in the process group, as "module:name"; the process that
            starts ranks need not import what they import.
        arguments: of the function.
    """

    def __init__(self, world: int, function: str, *arguments: Any) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD)
        with _unheard_errors():
            forkserver.ensure_running()
        self._folder = Path(tempfile.mkdtemp(prefix="ranks-"))
        self._processes = [
            context.Process(
                target=_rank, args=(rank, world, str(self._folder), function, arguments)
            )
            for rank in range(world)
        ]
        for process in self._processes:
            process.start()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def wait(self, seconds: float) -> bool:
        """Wait a while; returns whether all are done.

        Raises:
            LaunchFailed: a rank failed; its peers, which might wait for it, are killed.
        """
        running = [p for p in self._processes if p.exitcode is None]
        if running:
            wait([p.sentinel for p in running], timeout=seconds)
        failed = [(r, p.exitcode) for r, p in enumerate(self._processes) if p.exitcode]
        if failed:
            time.sleep(0.5)  # those that fail with it have something to say, too
            reason = self._reason(*failed[0])
            self.kill()
            raise LaunchFailed(reason)
        return all(p.exitcode == 0 for p in self._processes)

    def kill(self) -> None:
        """SIGKILL to every rank that still runs, all at once."""
        for process in self._processes:
            if process.exitcode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
        for process in self._processes:
            process.join()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _reason(self, rank: int, code: int) -> str:
        said = sorted(self._folder.glob("error-*"), key=lambda path: path.stat().st_mtime_ns)
        if said:
            return said[0].read_text()
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"rank {rank} ended with {how}"


@contextlib.contextmanager
def _unheard_errors() -> Iterator[None]:
    """What is started in the block has no stderr: dozens of warnings of imports would go there."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _rank(rank: int, world: int, folder: str, function: str, arguments: tuple) -> None:
    log = os.open(Path(folder, f"log-{rank}"), os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    threading.Thread(target=_end_with_the_command, daemon=True).start()
    gc.freeze()  # as tests/harness/garbage.py has it, without looking for garbage first
    try:
        with _process_group(rank, world, folder):
            module, _, name = function.partition(":")
            getattr(importlib.import_module(module), name)(*arguments)
    except BaseException as error:
        text = str(error).strip().splitlines()
        first = f"rank {rank}: {type(error).__name__}: {text[0] if text else ''}"
        Path(folder, f"error-{rank}").write_text(f"{first}\n{traceback.format_exc()}")
        os._exit(1)  # without waiting for threads that wait for peers
    os._exit(0)


def _end_with_the_command() -> None:
    """A command that is killed leaves no ranks behind that do what its next run does again."""
    multiprocessing.parent_process().join()
    os._exit(1)


@contextlib.contextmanager
def _process_group(rank: int, world: int, folder: str) -> Iterator[None]:
    import torch.distributed as dist

    from tests.harness.backend import choose, device_for

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    device_for(rank, world)
    dist.init_process_group(
        choose(world)[0],
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=_TIMEOUT_S),
    )
    yield
    dist.barrier()  # gloo may still be connecting some pair
    dist.destroy_process_group()
