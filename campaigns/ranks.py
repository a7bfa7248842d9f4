# SPDX-License-Identifier: Apache-2.0
"""The ranks of one launch: started as tests start programs, ended all at once."""

from __future__ import annotations

import contextlib
import datetime
import importlib
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.harness import gpus, programs
from tests.harness.fork_server import Forked

_ROOT = Path(__file__).resolve().parents[1]
_COMMAND, _WORK, _ERROR = "CAMPAIGN_PID", "work", "error-"
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
    """

    def __init__(
        self,
        world: int,
        function: str,
        *arguments: Any,
        backend: str = "auto",
        logs: Path | None = None,
    ) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="ranks-"))
        (self._folder / _WORK).write_bytes(pickle.dumps((function, arguments)))
        environment = _environment(backend)
        self._log = self._folder / "log"
        self._process = programs.start(
            ["-m", __name__, str(self._folder), str(logs or self._folder), backend],
            Path.cwd(),
            environment,
            self._log,
            self._log,
            # A process that has imported everything sees no GPU.
            fresh=gpus.visible(environment) >= world,
            ranks=world,
        )

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def wait(self, seconds: float) -> bool:
        """Wait a while; returns whether all are done.

        Raises:
            LaunchFailed: a rank failed; its peers, which might wait for it, are killed.
        """
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        if code:
            reason = self._reason()
            self.kill()
            raise LaunchFailed(reason)
        return True

    def kill(self) -> None:
        """SIGKILL to every rank that still runs, all at once."""
        if isinstance(self._process, Forked):
            self._process.close()
        else:
            for path in self._folder.glob("pid-*"):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(path.suffix[1:]), signal.SIGKILL)
            self._process.terminate()
            self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _reason(self) -> str:
        """Of the rank that failed first; peers of one that was killed only lost it."""
        rank, code = programs.first_failed(self._process, self._log)
        said = sorted(self._folder.glob(f"{_ERROR}*"), key=lambda path: path.stat().st_mtime_ns)
        if said and (code is None or code > 0):
            return said[0].read_text()
        if code is None:
            return f"the launch ended with exit code {self._process.returncode}"
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"rank {rank} ended with {how}"


def _environment(backend: str) -> dict[str, str]:
    """What ranks are to find in it: they share the cores and the host, and compile nothing."""
    found = {"OMP_NUM_THREADS": "1", **os.environ, _COMMAND: str(os.getpid())}
    found["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_ROOT), found.get("PYTHONPATH")]))
    if sys.platform == "linux":
        found.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if backend == "gloo":
        found.setdefault("TORCHDYNAMO_DISABLE", "1")
        found["CUDA_VISIBLE_DEVICES"] = ""
    return found


def function_of(name: str) -> Callable[..., Any]:
    """Import what ``"module:name"`` says."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def main(folder: Path, logs: Path, backend: str) -> None:
    """What one rank does, from its log to its last barrier."""
    import torch.distributed as dist

    from tests.harness.backend import choose, device_for, share_gloo_device

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    (folder / f"pid-{rank}.{os.getpid()}").touch()
    programs.end_with(int(os.environ[_COMMAND]))
    log = os.open(logs / f"log-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        if backend != "gloo":
            device_for(rank, world)
        share_gloo_device()
        dist.init_process_group(
            choose(world)[0] if backend == "auto" else backend,
            timeout=datetime.timedelta(seconds=_TIMEOUT_S),
        )
        function, arguments = pickle.loads((folder / _WORK).read_bytes())
        function_of(function)(*arguments)
        dist.barrier()  # gloo may still be connecting some pair
        dist.destroy_process_group()
    except BaseException as error:
        text = str(error).strip().splitlines()
        first = f"rank {rank}: {type(error).__name__}: {text[0] if text else ''}"
        (folder / f"{_ERROR}{rank}").write_text(f"{first}\n{traceback.format_exc()}")
        os._exit(1)  # without waiting for threads that wait for peers
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
