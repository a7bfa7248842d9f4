# SPDX-License-Identifier: Apache-2.0
"""How ranks become processes, and how they are waited for.

On the CPU they are forked from the launcher, which has imported the job's libraries once: eight
ranks that import them each take longer than a small job trains. The process that is forked from has
no thread that holds a lock of C++: it serves the ranks' store only after all are forked, and they
wait for it. With GPUs each rank is a process of its own script, under PyTorch's elastic agent.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import multiprocessing
import os
import signal
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mimo_colocated.launch.failures import Exit
from mimo_colocated.launch.ranks import end_with_the_launcher, run_rank

if TYPE_CHECKING:
    from mimo_colocated.launch.launcher import Job

CAN_FORK = sys.platform == "linux"
"""Elsewhere the system's own libraries do not survive it."""

_POLL_S = 0.1
_SETTLE_S = 0.5  # after the first failure; then SIGTERM
_ENDING_S = 30.0  # after SIGTERM; then SIGKILL
_HOST = "localhost"
_INTERRUPTS = (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


class Interrupted(Exception):
    """The launcher received ``sent``, and all ranks were ended."""

    def __init__(self, sent: signal.Signals) -> None:
        super().__init__(sent.name)
        self.sent = sent


# ------------------------------------------------------------------------------------- forked


def fork_ranks(job: Job, argv: Sequence[str], world: int, folder: Path) -> dict[int, Exit]:
    """Fork the ranks, wait for them, and end the others when one fails.

    Args:
        job: what they run.
        argv: command line after the script's name.
        world: number of ranks.
        folder: that they share.

    Returns:
        The ranks that did not end with exit code 0, and how they ended; none if all worked.

    Raises:
        Interrupted: Ctrl-C, SIGHUP or SIGQUIT.
    """
    gate, context = folder / "store", multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=_be_rank, args=(job, argv, rank, world, gate))
        for rank in range(world)
    ]
    with _interrupts():
        try:
            if job.prepare is not None:
                job.prepare()
            gc.freeze()  # what is imported stays shared: the ranks' collectors leave it alone
            for process in ranks:
                process.start()
            _store = _serve_store(gate)  # until all have ended
            return _wait(ranks)
        except BaseException as error:
            _end(ranks, error.sent if isinstance(error, Interrupted) else signal.SIGKILL)
            raise


def _be_rank(job: Job, argv: Sequence[str], rank: int, world: int, gate: Path) -> None:
    end_with_the_launcher()
    for sent in _INTERRUPTS[1:]:
        signal.signal(sent, signal.SIG_DFL)
    set_name = 15  # what ps and top show
    ctypes.CDLL(None).prctl(set_name, f"rank {rank}".encode())
    with contextlib.suppress(AttributeError):  # some other stream
        cast(Any, sys.stdout).reconfigure(write_through=True)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": _HOST,
        "MASTER_PORT": _port(gate),
        # The store is the launcher's.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    import torch

    # What imported torch before the launcher has not seen the variable.
    with contextlib.suppress(ValueError):
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    run_rank(job, argv)


def _serve_store(gate: Path) -> Any:
    """Serve the store that ranks find each other by, and tell them its port."""
    from torch.distributed import TCPStore

    store = TCPStore(_HOST, 0, is_master=True, wait_for_workers=False)
    told = gate.with_suffix(".tmp")
    told.write_text(str(store.port))
    told.replace(gate)
    return store


def _port(gate: Path) -> str:
    """The store's port, once it is served: when all ranks are forked."""
    launcher = os.getppid()
    while not gate.exists():
        if os.getppid() != launcher:
            os._exit(1)
        time.sleep(0.002)
    return gate.read_text()


def _wait(ranks: Sequence[Any]) -> dict[int, Exit]:
    """Wait for all; after the first failure end the others, and return all that failed."""
    running, exits = dict(enumerate(ranks)), {}
    while running and not exits:
        _collect(running, exits, _POLL_S)
    if exits:
        # Peers of a lost rank say what they waited in, and save it, before they are ended.
        deadline = time.monotonic() + _SETTLE_S
        while running and (left := deadline - time.monotonic()) > 0:
            _collect(running, exits, left)
        _end(running.values(), signal.SIGTERM)
        _collect(running, exits, 0)
    return exits


def _collect(running: dict[int, Any], exits: dict[int, Exit], seconds: float) -> None:
    """Wait for some rank to end; move those that have, and note those that failed."""
    wait([process.sentinel for process in running.values()], timeout=seconds)
    for rank in [rank for rank, process in running.items() if process.exitcode is not None]:
        code = running.pop(rank).exitcode
        if code:
            exits[rank] = Exit(code, time.time())


def _end(ranks: Any, sent: signal.Signals) -> None:
    """End what still runs: by the signal, and 30 s later by SIGKILL."""
    ranks = [process for process in ranks if process.pid is not None]
    for process in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, sent)
    deadline = time.monotonic() + _ENDING_S
    for process in ranks:
        process.join(max(0.0, deadline - time.monotonic()))
    for process in ranks:
        process.kill()
        process.join()


@contextlib.contextmanager
def _interrupts() -> Iterator[None]:
    """Within it what interrupts the launcher raises :class:`Interrupted`."""

    def interrupt(number: int, _frame: object) -> None:
        for each in _INTERRUPTS:
            signal.signal(each, signal.SIG_IGN)
        raise Interrupted(signal.Signals(number))

    before = {sent: signal.signal(sent, interrupt) for sent in _INTERRUPTS}
    try:
        yield
    finally:
        for sent, handler in before.items():
            signal.signal(sent, handler)


# ------------------------------------------------------------------------------ elastic agent


def start_scripts(job: Job, argv: Sequence[str], world: int, folder: Path) -> dict[int, Exit]:
    """Start the job's script once per rank and wait; what it returns is as :func:`fork_ranks`.

    Raises:
        Interrupted: Ctrl-C, SIGHUP or SIGQUIT.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    # The agent's own account of a failure is a page per rank; ours is one sentence.
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        agent = elastic_launch(_config(world, folder), sys.executable)
        agent("-u", str(Path(job.script).resolve()), *argv)
    except ChildFailedError as error:
        failed = error.failures.items()
        return {rank: Exit(failure.exitcode, failure.timestamp) for rank, failure in failed}
    except SignalException as stop:
        raise Interrupted(stop.sigval) from stop
    except KeyboardInterrupt as stop:
        raise Interrupted(signal.SIGINT) from stop
    return {}


def _config(world: int, folder: Path) -> Any:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig

    # SIGTERM is passed on to the ranks without a time limit (``stopping.py``). An older torch does
    # it itself, and kills them after 30 s.
    signals: dict[str, Any] = {"signals_to_handle": "SIGINT,SIGHUP,SIGQUIT"}
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=world,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint=f"{_HOST}:0",
        local_addr=_HOST,
        max_restarts=0,
        monitor_interval=_POLL_S,
        logs_specs=DefaultLogsSpecs(log_dir=str(folder)),
        **(signals if hasattr(LaunchConfig, "signals_to_handle") else {}),
    )
