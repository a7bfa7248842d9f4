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
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

# The digits come with scikit-learn, whose import takes longer than a small run trains.
_PRELOAD = ("tests.harness.backend", "sklearn.datasets")
# Longer than any collective of these small models waits on a busy machine.
_TIMEOUT_S = 180


class LaunchFailed(RuntimeError):
    """A rank ended before it was done; the message says which and how."""


class Ranks:
    """``world`` running processes with one process group; end them with :meth:`kill`.

    Args:
        world: number of ranks.
        function: what each does, called in the process group, as "module:name"; the process that
            starts ranks need not import what they import.
        arguments: of the function.
        backend: of the process group; ``"auto"`` takes NCCL where there is a GPU per rank.
        logs: folder for what ranks print; without one that ends with them: what counts is in their
            results and errors.
        preload: a module for the process that ranks are forked from; the first launch decides.
    """

    def __init__(
        self,
        world: int,
        function: str,
        *arguments: Any,
        backend: str = "auto",
        logs: Path | None = None,
        preload: str = "tests.unit_tests.mimo.digits_runs",
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([preload, *_PRELOAD])
        with _unheard_errors(), _environment(backend):
            forkserver.ensure_running()
        self._folder = Path(tempfile.mkdtemp(prefix="ranks-"))
        places = (str(self._folder), str(logs or self._folder), backend)
        self._processes = [
            context.Process(target=_rank, args=(rank, world, places, function, arguments))
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
        if any(p.exitcode for p in self._processes):
            time.sleep(0.5)  # those that fail with it have something to say, too
            reason = self._reason()
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

    def _reason(self) -> str:
        """Of the rank that failed first; peers of one that was killed only lost it."""
        codes = {rank: p.exitcode for rank, p in enumerate(self._processes) if p.exitcode}
        said = sorted(self._folder.glob("error-*"), key=lambda path: path.stat().st_mtime_ns)
        killed = [rank for rank, code in codes.items() if code < 0]
        if said and not killed:
            return said[0].read_text()
        rank = (killed or list(codes))[0]
        how = signal.Signals(-codes[rank]).name if killed else f"exit code {codes[rank]}"
        return f"rank {rank} ended with {how}"


@contextlib.contextmanager
def _environment(backend: str) -> Iterator[None]:
    """What ranks are to find in it: they share the cores and the host, and compile nothing."""
    before = dict(os.environ)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if backend == "gloo":
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


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


def function_of(name: str) -> Callable[..., Any]:
    """Import what ``"module:name"`` says."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _rank(
    rank: int, world: int, places: tuple[str, str, str], function: str, arguments: tuple
) -> None:
    folder, logs, backend = places
    log = os.open(Path(logs, f"log-{rank}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    threading.Thread(target=_end_with_the_command, daemon=True).start()
    gc.freeze()  # as tests/harness/garbage.py has it, without looking for garbage first
    try:
        with _process_group(rank, world, folder, backend):
            function_of(function)(*arguments)
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
def _process_group(rank: int, world: int, folder: str, backend: str) -> Iterator[None]:
    import torch.distributed as dist

    from tests.harness.backend import choose, device_for, share_gloo_device

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    if backend != "gloo":
        device_for(rank, world)
    share_gloo_device()
    dist.init_process_group(
        choose(world)[0] if backend == "auto" else backend,
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=_TIMEOUT_S),
    )
    yield
    dist.barrier()  # gloo may still be connecting some pair
    dist.destroy_process_group()
