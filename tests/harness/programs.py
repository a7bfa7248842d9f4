# SPDX-License-Identifier: Apache-2.0
"""Python programs that tests run as a user does, without importing PyTorch again for each.

A test of start-up itself, or of what is set before the first import, starts ``sys.executable``.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.harness.fork_server import Forked, Start, shared_server


def start(
    arguments: Sequence[str],
    folder: Path,
    environment: Mapping[str, str],
    output: Path,
    errors: Path,
    *,
    fresh: bool = False,
    ranks: int = 0,
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
    """
    address = None if fresh else shared_server()
    for path in (output, errors):
        path.touch()  # there before the program is
    if address is not None:
        asked = (list(arguments), str(folder), dict(environment), str(output))
        return Forked(address, Start(*asked, ranks, str(errors)))
    if ranks:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
        arguments = [*torchrun, f"--nproc-per-node={ranks}", *arguments]
    with output.open("w") as out, errors.open("w") as err:
        return subprocess.Popen(
            [sys.executable, *arguments],
            cwd=folder,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )


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
