# SPDX-License-Identifier: Apache-2.0
"""Starts Python programs in forks of a process that has imported the libraries already.

Importing PyTorch and Megatron-Core takes seconds of CPU time in each process, most tests less
than one. The server imports, and does nothing else: no thread, no process group, so that each
start finds what a fresh interpreter finds after the same imports. On its own::

    python -m tests.harness.fork_server SOCKET MODULE ...      ends when its standard input does

One connection is one start. The client sends a line of JSON (see :class:`Start`), gets a line
with the process's id (of several ranks: their group's) and, at the end, a line with the exit code
and the rank that had it. When the client goes away everything that was started for it is killed.
The processes of a start with several ranks know their rank as they would from ``torchrun``, and end
together when one of them fails.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

ADDRESS_VARIABLE = "MIMO_FORK_SERVER"
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
OURS = (
    "megatron.core.models.mimo",
    "megatron.core.models.mimo.job",
    "examples.mimo.digits.job",
    "mimo_colocated.cli.main",
    "mimo_colocated.train.job",
)
"""Of this project: what a server may import whose starts all run this checkout's code."""
_ALL = (
    *LIBRARIES,
    "matplotlib.pyplot",
    "transformers.models.llava.modeling_llava",
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
    "datasets",
    "peft",
    *OURS,
)
CAN_FORK = sys.platform == "linux"
_OURS = ("tests", "mimo_colocated", "megatron.core.hyper_comm_grid", "megatron.core.models.mimo")
_FINDERS = ("MimoFinder", "MissingFinder")
_ROOT = Path(__file__).resolve().parents[2]
_POLL_S = 0.02
_PATIENCE_S = 10.0
_DEATH_SIGNAL = 1


@dataclass(frozen=True)
class Start:
    """What to start.

    Attributes:
        arguments: of Python: ``-m`` and a module, ``-c`` and a program, or a script; then theirs.
        folder: the working directory. What its modules are called is found there first.
        environment: all of it.
        output: file for standard output and error; with several ranks ``{rank}`` is the rank.
        ranks: of a launch; 0 starts one process that is no rank.
        errors: file for standard error, if it is another one.
    """

    arguments: list[str]
    folder: str
    environment: dict[str, str]
    output: str
    ranks: int = 0
    errors: str = ""


class Forked:
    """A start that the server was asked for; as much of ``subprocess.Popen`` as is needed.

    Attributes:
        returncode: of the first process that failed, else 0; ``None`` while they run.
        rank: of that process; ``None`` if none failed.
    """

    def __init__(self, address: str, start: Start) -> None:
        self.returncode: int | None = None
        self.rank: int | None = None
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(address)
        self._connection.sendall(json.dumps(asdict(start)).encode() + b"\n")
        self._lines = self._connection.makefile("r")
        self.pid = int(self._lines.readline())

    def poll(self) -> int | None:
        """The exit code, ``None`` while it runs."""
        if self.returncode is None and select.select([self._connection], [], [], 0)[0]:
            # No line at all: the process that should have sent it was killed.
            code, _, rank = self._lines.readline().partition(" ")
            self.returncode = int(code or -signal.SIGKILL)
            self.rank = int(rank) if self.returncode and rank else None
            self.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal to the process."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def close(self) -> None:
        """Go away; the server then kills what still runs, and this waits until it has."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_WR)
            self._connection.recv(64)
        self._lines.close()
        self._connection.close()

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the exit code.

        Raises:
            subprocess.TimeoutExpired: it took longer.
        """
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("a forked start", timeout)
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
        # PyArrow, which pandas imports where it is installed, would start a thread.
        environment = {**environment, "JE_ARROW_MALLOC_CONF": "background_thread:false"}
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", __name__, self.address, *libraries],
            cwd=_ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        if self._process.stdout.readline() != b"ready\n":
            raise RuntimeError("the server that forks tests did not start; what it said is above")

    def close(self) -> None:
        """End the server; what it has started goes on."""
        self._process.communicate()
        self.returncode = self._process.returncode


@functools.cache
def shared_server() -> str | None:
    """Address of the server of this pytest run; ``None`` where starts have to be fresh.

    It is started when it is first asked for and ends with this process; what this process starts
    finds it in its environment.
    """
    if not CAN_FORK or os.environ.get(ADDRESS_VARIABLE) == "":
        return None
    if ADDRESS_VARIABLE not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix="fork-server-")
        # The log level as the package's launcher has it: PyTorch reads it when it is imported.
        once = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment = {**os.environ, **once, "TORCH_CPP_LOG_LEVEL": "FATAL"}
        server = ForkServer(Path(folder.name), environment, _ALL)
        os.environ[ADDRESS_VARIABLE] = server.address
        atexit.register(folder.cleanup)
        atexit.register(server.close)
    return os.environ[ADDRESS_VARIABLE]


def main(address: str, *libraries: str) -> None:
    """Import, then serve until standard input ends."""
    for name in libraries:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    ours = any(name in libraries for name in OURS)
    if not ours and any(name in sys.modules for name in _OURS[2:]):
        # Megatron-Core 0.19 imports our names itself: its modules would keep the wrong ones.
        others = [name for name in libraries if not name.startswith("megatron.")]
        command = [sys.executable, "-W", "ignore", "-m", "tests.harness.fork_server", address]
        os.execv(sys.executable, [*command, *others])
    if "torch.distributed" in sys.modules:
        importlib.import_module("tests.harness.backend").share_gloo_device()
    if threading.active_count() > 1 or len(os.listdir("/proc/self/task")) > 1:
        raise RuntimeError("an import has started a thread, which a fork would not have")
    gc.collect()
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
                    _answer(connection, ours)
                connection.close()


def _answer(connection: socket.socket, ours: bool) -> NoReturn:
    """One start, from its request to its exit code; in a process and session of its own."""
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # Signals to the group are for the ranks; this process follows them.
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (2, 15)}
    start = Start(**json.loads(connection.makefile("r").readline()))
    gate = os.pipe()
    workers = {}
    for rank in range(max(start.ranks, 1)):
        pid = os.fork()
        if pid == 0:
            connection.close()
            os.close(gate[1])
            for number, handler in before.items():
                signal.signal(number, handler)
            _work(start, rank, gate[0], ours)
        workers[pid] = rank
    first = os.getpid() if start.ranks else next(iter(workers))
    connection.sendall(f"{first}\n".encode())
    _store = _rendezvous(start.ranks, gate[1])  # until all have ended
    code, rank = _follow(workers, connection)
    with contextlib.suppress(OSError):
        connection.sendall(f"{code} {rank}\n".encode())
    os._exit(0)


def _follow(workers: dict[int, int], connection: socket.socket) -> tuple[int, int]:
    """Wait for the workers; the first bad exit code and whose, and then the others are ended."""
    code, rank, deadline = 0, 0, float("inf")
    left = dict(workers)
    while left:
        gone = bool(select.select([connection], [], [], _POLL_S)[0])
        ended = []
        for pid in list(left):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                ended.append((os.waitstatus_to_exitcode(status), left.pop(pid)))
        # Of those that end at once one that a signal ended comes first: the others lost it.
        code, rank = (code, rank) if code else min((e for e in ended if e[0]), default=(0, 0))
        if code and deadline == float("inf"):
            deadline = time.monotonic() + _PATIENCE_S
            _signal(left, signal.SIGTERM)
        if gone or time.monotonic() > deadline:
            _signal(left, signal.SIGKILL)
            deadline = float("inf") if gone else time.monotonic() + _PATIENCE_S
    return code, rank


def _signal(pids: dict[int, int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _rendezvous(ranks: int, gate: int) -> Any:
    """Serve the store that the ranks find each other by, and tell them its port.

    Where nothing has imported PyTorch nobody needs a store: the port is a free one.
    """
    if not ranks:
        return os.close(gate)
    if "torch.distributed" in sys.modules:
        tcp_store = sys.modules["torch.distributed"].TCPStore
        store = tcp_store("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port = store.port
    else:
        with socket.socket() as store:
            store.bind(("127.0.0.1", 0))
            port = store.getsockname()[1]
    # A line of the same length for each: nobody reads what is another one's.
    os.write(gate, f"{port:07}\n".encode() * ranks)
    os.close(gate)
    return store


def _work(start: Start, rank: int, gate: int, ours: bool) -> NoReturn:
    """Become the process that was asked for."""
    code = 1
    try:
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL)
        _redirect(start, rank)
        os.environ.clear()
        os.environ.update(start.environment)
        if start.ranks:
            os.environ.update(_variables(start.ranks, rank, os.read(gate, 8)))
        else:
            os.setsid()
        os.close(gate)
        os.chdir(start.folder)
        _reset()
        _import_from(start.folder, ours)
        code = _run(start.arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def _redirect(start: Start, rank: int) -> None:
    output = Path(start.output.format(rank=rank))
    output.parent.mkdir(parents=True, exist_ok=True)
    # Appended: ranks may share a file.
    for number, path in ((1, output), (2, Path(start.errors or output))):
        with path.open("ab") as file:
            os.dup2(file.fileno(), number)
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    if start.environment.get("PYTHONUNBUFFERED"):
        sys.stdout.reconfigure(write_through=True)


def _variables(ranks: int, rank: int, line: bytes) -> dict[str, str]:
    """What torchrun sets."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(int(line)),
        # The store is not of rank 0.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def _reset() -> None:
    """What an interpreter sets when it starts, and PyTorch when it is imported."""
    warnings.resetwarnings()
    for category in (ResourceWarning, ImportWarning, PendingDeprecationWarning, DeprecationWarning):
        warnings.simplefilter("ignore", category)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def _import_from(folder: str, ours: bool) -> None:
    """Find modules as a fresh interpreter does, this project's in ``folder`` unless they are there.

    Args:
        folder: the working directory.
        ours: the project's modules that are imported already are the right ones.
    """
    for name in list(sys.modules):
        if any(
            name == each or name.startswith(f"{each}.") for each in _OURS[: 1 if ours else None]
        ):
            del sys.modules[name]
    if not ours:
        finders = [f for f in sys.meta_path if getattr(f, "__name__", "") not in _FINDERS]
        sys.meta_path[:] = finders
    paths = [folder, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    sys.path[:] = [*paths, *(path for path in sys.path if path not in ("", *paths))]
    importlib.invalidate_caches()
    if not ours and (Path(folder) / "mimo_colocated").is_dir():
        importlib.import_module("mimo_colocated._startup")
    sys.modules.pop("sitecustomize", None)
    with contextlib.suppress(ModuleNotFoundError):
        importlib.import_module("sitecustomize")


def _run(arguments: Sequence[str]) -> int:
    """Run a module, a program or a script as ``python`` does; its exit code."""
    kind, code = arguments[0], 0
    try:
        if kind == "-m":
            sys.argv = list(arguments[1:])
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        elif kind == "-c":
            sys.argv = ["-c", *arguments[2:]]
            exec(compile(arguments[1], "<string>", "exec"), _fresh_main())
        else:
            sys.argv = list(arguments)
            sys.path[0] = str(Path(kind).resolve().parent)
            exec(compile(Path(kind).read_text(), kind, "exec"), _fresh_main(__file__=kind))
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    return code


def _fresh_main(**names: str) -> dict[str, Any]:
    """The namespace of a new ``__main__``, which replaces this module's."""
    sys.modules["__main__"] = main_module = type(sys)("__main__")
    vars(main_module).update(names, __builtins__=__builtins__)
    return vars(main_module)


if __name__ == "__main__":
    main(*sys.argv[1:])
