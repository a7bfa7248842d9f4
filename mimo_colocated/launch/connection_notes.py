# SPDX-License-Identifier: Apache-2.0
"""Gloo's own lines on connections that are refused, kept away from the one message of a failure."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator

_GLOO = b"gloo/transport/tcp/debug_logger.cc"
_held: list[Callable[[], None]] = []


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Hold back what this process writes to stderr; show it afterwards, less the notes.

    While groups are made their members connect to each other. If one of them is lost, gloo writes
    a line per attempt straight to the process's stderr, which no log level stops. A process that is
    killed within it takes what waits with it.
    """
    sys.stderr.flush()
    shown, waiting = os.dup(2), tempfile.TemporaryFile()  # noqa: SIM115 closed by show()
    os.dup2(waiting.fileno(), 2)

    def put_back() -> None:
        sys.stderr.flush()
        os.dup2(shown, 2)
        os.close(shown)
        with waiting:
            waiting.seek(0)
            rest = b"".join(line for line in waiting if _GLOO not in line)
        if rest:
            os.write(2, rest)

    _held.append(put_back)
    try:
        yield
    finally:
        show()


def show() -> None:
    """Show what waits now; also for a thread that is about to end the process."""
    while _held:
        _held.pop()()
