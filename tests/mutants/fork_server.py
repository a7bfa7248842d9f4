# SPDX-License-Identifier: Apache-2.0
"""Starts pytest in a fork of a process that has imported the libraries already.

Importing PyTorch and Megatron-Core takes seconds of CPU time in each process, most tests less
than one. The server imports the libraries once, and nothing of this project: what a fork imports
of it comes from the folder that it is told to work in. On its own::

    python -m tests.mutants.fork_server SOCKET MODULE ...      ends when its standard input does

One connection is one start. The client sends a line of JSON (see :class:`Start`), gets a line
with the process group's id and, at the end, a line with the exit code. When the client goes away
everything that was started for it is killed. The processes of a start with several ranks know
their rank as they would from ``torchrun``, and end together when one of them fails.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

ADDRESS_VARIABLE = "MUTANTS_FORK_SERVER"
LIBRARIES = (
    "numpy",
    "pytest",
    "hypothesis",
    "sklearn.datasets",
    "torch.distributed.checkpoint",
    "megatron.core.models.gpt",
    "megatron.core.distributed",
    "megatron.core.dist_checkpointing",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel",
)
_OURS = ("tests", "mimo_colocated", "megatron.core.hyper_comm_grid", "megatron.core.models.mimo")
_FINDERS = ("MimoFinder", "MissingFinder")
_POLL_S = 0.02
_PATIENCE_S = 10.0


@dataclass(frozen=True)
class Start:
    """What to start.

    Attributes:
        arguments: of pytest.
        folder: the working directory, and where the project's modules are imported from.
        environment: all of it.
        output: file for standard output and error; with several ranks ``{rank}`` is the rank.
        ranks: of a launch; 0 starts one process that is no rank.
    """

    arguments: list[str]
    folder: str
    environment: dict[str, str]
    output: str
    ranks: int = 0


class Forked:
    """A start that the server was asked for; as much of ``subprocess.Popen`` as is needed."""

    def __init__(self, address: str, start: Start) -> None:
        self.returncode: int | None = None
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(address)
        self._connection.sendall(json.dumps(asdict(start)).encode() + b"\n")
        self._lines = self._connection.makefile("r")
        self.pid = int(self._lines.readline())

    def poll(self) -> int | None:
        """The exit code, ``None`` while it runs."""
        if self.returncode is None and select.select([self._connection], [], [], 0)[0]:
            # No line at all: the process that should have sent it was killed.
            self.returncode = int(self._lines.readline() or -signal.SIGKILL)
            self.close()
        return self.returncode

    def close(self) -> None:
        """Go away; the server then kills what still runs."""
        self._lines.close()
        self._connection.close()

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the exit code.

        Raises:
            subprocess.TimeoutExpired: it took longer.
        """
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("pytest", timeout)
            self.poll()
        return self.returncode


class ForkServer:
    """A running server; it ends with :meth:`close`, or with this process.

    Args:
        folder: where its socket goes.
        environment: its environment variables.
        libraries: modules that it imports, as far as they are there.

    Raises:
        RuntimeError: it did not start.
    """

    def __init__(
        self, folder: Path, environment: dict[str, str], libraries: Sequence[str] = LIBRARIES
    ) -> None:
        self.address = str(folder / "fork-server")
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", __name__, self.address, *libraries],
            cwd=Path(__file__).resolve().parents[2],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        if self._process.stdout.readline() != b"ready\n":
            raise RuntimeError("the server that forks pytest did not start; try --cold")

    def close(self) -> None:
        """End the server; what it has started goes on."""
        self._process.communicate()
        self.returncode = self._process.returncode


def main(address: str, *libraries: str) -> None:
    """Import, then serve until standard input ends."""
    for name in libraries:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    if any(name in sys.modules for name in _OURS[2:]):
        # Megatron-Core 0.19 imports our names itself: its modules would keep the wrong ones.
        others = [name for name in libraries if not name.startswith("megatron.")]
        command = [sys.executable, "-W", "ignore", "-m", "tests.mutants.fork_server", address]
        os.execv(sys.executable, [*command, *others])
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        print("ready", flush=True)
        while sys.stdin not in (ready := select.select([server, sys.stdin], [], [])[0]):
            if server in ready:
                connection, _ = server.accept()
                if os.fork() == 0:
                    server.close()
                    _answer(connection)
                connection.close()


def _answer(connection: socket.socket) -> NoReturn:
    """One start, from its request to its exit code; in a process and session of its own."""
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # Signals to the group are for pytest; this process follows it.
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (2, 15)}
    start = Start(**json.loads(connection.makefile("r").readline()))
    rendezvous = _rendezvous(start.ranks) if start.ranks else {}
    workers = []
    for rank in range(max(start.ranks, 1)):
        pid = os.fork()
        if pid == 0:
            connection.close()
            for number, handler in before.items():
                signal.signal(number, handler)
            _work(start, rank, rendezvous)
        workers.append(pid)
    connection.sendall(f"{os.getpid()}\n".encode())
    code = _follow(workers, connection)
    with contextlib.suppress(OSError):
        connection.sendall(f"{code}\n".encode())
    os._exit(0)


def _follow(workers: list[int], connection: socket.socket) -> int:
    """Wait for the workers; the first bad exit code, and then the others are ended."""
    code, deadline = 0, float("inf")
    left = set(workers)
    while left:
        gone = bool(select.select([connection], [], [], _POLL_S)[0])
        for pid in list(left):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                left.discard(pid)
                code = code or os.waitstatus_to_exitcode(status)
        if code and deadline == float("inf"):
            deadline = time.monotonic() + _PATIENCE_S
            _signal(left, signal.SIGTERM)
        if gone or time.monotonic() > deadline:
            _signal(left, signal.SIGKILL)
            deadline = float("inf") if gone else time.monotonic() + _PATIENCE_S
    return code


def _signal(pids: set[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _rendezvous(ranks: int) -> dict[str, str]:
    """Variables that all ranks of a start share, as torchrun sets them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    size = str(ranks)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, **address}


def _work(start: Start, rank: int, rendezvous: dict[str, str]) -> NoReturn:
    """Become the process that was asked for."""
    code = 1
    try:
        output = Path(start.output.format(rank=rank))
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        with open(os.devnull) as nothing:
            os.dup2(nothing.fileno(), 0)
        os.environ.clear()
        os.environ.update(start.environment, **rendezvous)
        if rendezvous:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
        os.chdir(start.folder)
        _import_from(start.folder)
        sys.argv = ["pytest", *start.arguments]
        code = int(importlib.import_module("pytest").main(start.arguments))
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def _import_from(folder: str) -> None:
    """The project's modules are forgotten, and found in ``folder`` from now on."""
    for name in list(sys.modules):
        if any(name == ours or name.startswith(f"{ours}.") for ours in _OURS):
            del sys.modules[name]
    sys.meta_path[:] = [f for f in sys.meta_path if getattr(f, "__name__", "") not in _FINDERS]
    sys.path[:] = [folder, *(path for path in sys.path if path not in ("", folder))]
    importlib.invalidate_caches()
    if (Path(folder) / "mimo_colocated").is_dir():
        importlib.import_module("mimo_colocated._startup")


if __name__ == "__main__":
    main(*sys.argv[1:])
