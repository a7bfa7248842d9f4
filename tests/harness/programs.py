# SPDX-License-Identifier: Apache-2.0
"""Python programs that tests run as a user does, without importing PyTorch again for each.

A test of start-up itself, or of what is set before the first import, starts ``sys.executable``.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.harness.fork_server import Forked, Start, shared_server

_EXIT_ORPHAN = 18


def start(
    arguments: Sequence[str],
    folder: Path,
    environment: Mapping[str, str],
    output: Path,
    errors: Path,
    *,
    fresh: bool = False,
    ranks: int = 0,
    logs: Path | None = None,
) -> subprocess.Popen | Forked:
    """Start ``python ARGUMENTS`` in a session of its own.

    Args:
        arguments: ``-c`` and a program, ``-m`` and a module, or a script; then theirs.
        folder: the working directory.
        environment: all of it.
        output: file for what it prints.
        errors: file for what it writes to stderr.
        fresh: import everything anew, as a user does.
        ranks: that torchrun would start; 0 for one process that is no rank.
        logs: folder for what ranks print, each in a folder of its own.
    """
    address = None if fresh else shared_server()
    for path in (output, errors):
        path.touch()  # there before the program is
    if address is not None:
        to = [f"{logs}/{{rank}}/stdout.log", ranks] if logs else [str(output), ranks, str(errors)]
        return Forked(address, Start(list(arguments), str(folder), dict(environment), *to))
    if ranks:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
        apart = ["--redirects=3", f"--log-dir={logs}"] if logs else []
        arguments = [*torchrun, *apart, f"--nproc-per-node={ranks}", *arguments]
    # Appended: both may be the same file.
    with output.open("a") as out, errors.open("a") as err:
        return subprocess.Popen(
            [sys.executable, *arguments],
            cwd=folder,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )


def first_failed(process: subprocess.Popen | Forked, log: Path) -> tuple[int | None, int | None]:
    """Rank and exit code of the first rank that failed, ``None`` where it is not known.

    Args:
        process: of :func:`start`, with ranks; it has ended.
        log: where its errors went.
    """
    if isinstance(process, Forked):
        return process.rank, process.returncode
    said = log.read_text(errors="replace")
    first = re.search(r"Root Cause.*?\n +rank +: (\d+)", said, re.DOTALL)
    if first is None:
        return None, None
    code = re.search(rf"\n +rank +: {first[1]} .*\n +exitcode +: (-?\d+)", said)
    return int(first[1]), int(code[1]) if code else None


def end_with(pid: int) -> None:
    """End this process when another one has ended, which cannot say so if it was killed."""

    def watch() -> None:
        while True:
            time.sleep(2)
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                os._exit(_EXIT_ORPHAN)

    threading.Thread(target=watch, daemon=True, name="watch").start()


def run(
    arguments: Sequence[str],
    folder: Path,
    environment: Mapping[str, str],
    timeout: float,
    ranks: int = 0,
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end; arguments as for :func:`start`.

    Raises:
        subprocess.TimeoutExpired: it took longer, and was killed.
    """
    with tempfile.TemporaryDirectory(prefix="program-") as logs:
        output, errors = Path(logs, "output"), Path(logs, "errors")
        process = start(arguments, folder, environment, output, errors, ranks=ranks)
        try:
            code = process.wait(timeout)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        texts = [path.read_text(errors="replace") for path in (output, errors)]
    return subprocess.CompletedProcess(list(arguments), code, *texts)
