# SPDX-License-Identifier: Apache-2.0
"""The digits job as a user starts it: a process of its own, its output folder, its metrics.

Faults are injected from outside: :func:`sabotage` puts a few lines of Python at the start of every
process of the job (a ``sitecustomize`` module), so that the code under test stays as it is.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from tests.faults.starts import LAUNCH_VARIABLES
from tests.harness.programs import start

TRAIN = Path(__file__).parents[2] / "examples" / "mimo" / "digits" / "train.py"
TIMEOUT_S = 500
# On a busy machine ranks start minutes apart; a rank that dies is noticed at once all the same.
_PATIENT = ("--timeout", "400")


class Job:
    """One start of ``train.py``.

    Args:
        out: its output folder.
        arguments: one string as typed after the script's name.
        faults: a folder of :func:`sabotage`.
        fresh: it imports everything anew, as for a user; else it is forked, which is quicker.
        variables: of its environment.
    """

    def __init__(
        self,
        out: Path,
        arguments: str,
        *,
        faults: Path | None = None,
        fresh: bool = False,
        **variables: str,
    ) -> None:
        self.out = out
        environment = {k: v for k, v in os.environ.items() if k not in LAUNCH_VARIABLES}
        if faults:
            paths = [str(faults), *filter(None, [environment.get("PYTHONPATH")])]
            environment["PYTHONPATH"] = os.pathsep.join(paths)
        self._output, self._errors = (
            _free_name(out.parent, f"{out.name}.{name}") for name in ("stdout", "stderr")
        )
        # Into files: nobody has to read a pipe while the test waits for something else.
        self.process = start(
            [str(TRAIN), *_PATIENT, *arguments.split(), "--out", str(out)],
            out.parent,
            environment | variables,
            self._output,
            self._errors,
            fresh=fresh,
        )

    @property
    def output(self) -> str:
        """What it printed so far."""
        return self._output.read_text()

    @property
    def errors(self) -> str:
        """What it wrote to stderr so far."""
        return self._errors.read_text()

    def processes(self) -> list[psutil.Process]:
        """The launcher, the ranks and what they started."""
        try:
            launcher = psutil.Process(self.process.pid)
            return [launcher, *launcher.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def rank(self, number: int) -> psutil.Process:
        """The process of one rank."""
        for process in self.processes()[1:]:
            with contextlib.suppress(psutil.Error):
                if process.name() == f"rank {number}" or _variable(process, "RANK") == str(number):
                    return process
        raise AssertionError(f"rank {number} does not run:\n{self.output}{self.errors}")

    def wait(self) -> Job:
        """Until it ends by itself."""
        try:
            self.process.wait(timeout=TIMEOUT_S)
        finally:
            self.kill()
        return self

    def wait_for(self, condition: Callable[[], Any]) -> None:
        """Until ``condition()`` is true, while the job runs."""
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            ended, late = self.process.poll() is not None, time.monotonic() > deadline
            if ended or late:
                self.kill()
                raise AssertionError(f"never came true:\n{self.output}\n{self.errors}")
            time.sleep(0.002)

    def kill(self) -> None:
        """SIGKILL to all of its processes at once."""
        running = self.processes()
        for process in running:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        self.process.wait(timeout=30)
        deadline = time.monotonic() + 30
        while any(map(is_alive, running)) and time.monotonic() < deadline:
            time.sleep(0.01)

    # ---- what it left --------------------------------------------------------------------

    def succeeded(self) -> Job:
        """Itself, or an error with all that it said."""
        assert self.process.returncode == 0, f"{self.output}\n{self.errors}"
        return self

    def error(self) -> str:
        """The one sentence of a job that failed; everything else about the console is checked."""
        text = self.errors
        assert self.process.returncode not in (0, None), self.output
        details = ("full traceback: ", "who waits for whom: ")
        lines = [line for line in text.splitlines() if not line.startswith(details)]
        assert len(lines) == 1, text
        assert lines[0].startswith("error: "), text
        assert "Traceback" not in self.output + text
        return lines[0].removeprefix("error: ")

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``, each of which must be whole."""
        return metrics(self.out)

    def losses(self) -> list[float]:
        """The loss of every step."""
        return [line["loss"] for line in self.metrics()]

    def summary(self) -> dict[str, Any]:
        """``summary.json``."""
        return json.loads((self.out / "summary.json").read_text())


def _variable(process: psutil.Process, name: str) -> str | None:
    """Of the environment that a process was started with."""
    return process.environ().get(name)


def is_alive(process: psutil.Process) -> bool:
    """Whether it still runs; one that only waits to be reaped does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def metrics(out: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``, each of which must be whole."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def steps_done(out: Path) -> int:
    """Whole lines of ``metrics.jsonl`` so far."""
    path = out / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def trained(steps: list[dict[str, Any]]) -> list[tuple[float, ...]]:
    """What training did in each step, without how long it took."""
    names = ("step", "loss", "grad_norm", "counted_tokens", "learning_rate")
    return [tuple(line[name] for name in names) for line in steps]


def checkpoints(out: Path) -> list[str]:
    """Names in the checkpoint folder, hidden ones too."""
    folder = out / "checkpoints"
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def everything(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Relative path and content of every file below ``folder``."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield str(path.relative_to(folder)), path.read_bytes()


_SITE = """
import os, sys

def begin(rank):
    exec({code!r}, {{"os": os, "RANK": rank, "__name__": "sabotage"}})

def forked(event, arguments):  # into a rank: the launcher's variables become those of a rank
    if event == "os.putenv" and arguments[0] == b"RANK":
        begin(arguments[1].decode())

begin(os.environ.get("RANK"))
if "RANK" not in os.environ:
    sys.addaudithook(forked)
"""


def sabotage(folder: Path, code: str) -> Path:
    """A folder for ``PYTHONPATH`` that runs ``code`` first in every process of a job."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(_SITE.format(code=code))
    return folder


def _free_name(folder: Path, name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    taken = len(list(folder.glob(f"{name}.*")))
    return folder / f"{name}.{taken}"
