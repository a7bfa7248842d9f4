# SPDX-License-Identifier: Apache-2.0
"""A job that is told to stop finishes its step, saves, and ends with an exit code of its own.

Schedulers warn before they kill: with SIGTERM, or with SIGUSR1 some time ahead (Slurm's
``--signal``). :class:`StopRequests` remembers such a signal in each process, and once per step the
ranks agree whether any of them has one. What then happens is the job's:

    requests = StopRequests().install()  # first of all, on the main thread
    for step in range(done, steps):
        if requests.agreed():
            store.save(step, model, optimizer)
            dist.barrier()
            sys.exit(EXIT_CODE)
        train(step)

torch is imported by ``agreed`` only: a rank can be told to stop while it still imports.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

EXIT_CODE = 75
"""Of a job that saved because it was told to: ``EX_TEMPFAIL``, "try again later"."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What asks a job to stop; the first is the more urgent one."""

_installed: list[StopRequests] = []


class StopRequests:
    """Signals to stop, remembered in this process and agreed on by all ranks.

    The process goes on when SIGTERM or SIGUSR1 arrives. A second SIGTERM ends it at once, by the
    signal's default action, even while its main thread waits in a collective. One that follows the
    first within ``same_request_s`` is the same request: schedulers signal every process of a job,
    and launchers such as ``torchrun`` pass on to the ranks what they receive themselves.

    Args:
        on_signal: called on a thread of its own as ``on_signal(signal, again)`` before anything is
            done; ``again`` is True for a second SIGTERM. If it returns True, nothing is.
        same_request_s: seconds.
    """

    def __init__(
        self,
        on_signal: Callable[[signal.Signals, bool], bool | None] | None = None,
        same_request_s: float = 2.0,
    ) -> None:
        self._on_signal, self._same_request_s = on_signal, same_request_s
        self._asked: set[signal.Signals] = set()
        self._terminated_at: float | None = None
        self._handlers: dict[signal.Signals, Any] = {}
        self._pipe: Any = None  # (reading end, writing end) once installed

    @property
    def asked(self) -> signal.Signals | None:
        """What this process alone was asked by; the more urgent signal of two."""
        return next((sent for sent in SIGNALS if sent in self._asked), None)

    def ask(self, sent: signal.Signals = signal.SIGTERM) -> None:
        """Ask in the place of a signal, as for a job that knows its time limit."""
        self._asked.add(signal.Signals(sent))

    def agreed(
        self, device: Any = "cpu", group: ProcessGroup | None = None
    ) -> signal.Signals | None:
        """Return what any rank was asked by, the same on all; every rank of ``group`` calls it.

        One all-reduce of two integers and a look at its result.

        Args:
            device: that the group's backend reduces on.
            group: of all ranks of the job, the default one by default.
        """
        import torch
        import torch.distributed as dist

        flags = torch.tensor([sent in self._asked for sent in SIGNALS], dtype=torch.int32)
        if dist.is_initialized():
            flags = flags.to(device)
            dist.all_reduce(flags, group=group)
        found = flags.tolist()
        return next((sent for sent, count in zip(SIGNALS, found, strict=True) if count), None)

    # ---- this process's signals -----------------------------------------------------------

    def install(self) -> StopRequests:
        """Receive this process's signals from now on; returns itself.

        Raises:
            ValueError: not on the main thread, the only one that may handle signals.
            RuntimeError: other requests, or an event loop, receive them already.
        """
        if _installed:
            raise RuntimeError("other StopRequests receive the signals; close() them first")
        owner = signal.set_wakeup_fd(-1)
        if owner != -1:
            signal.set_wakeup_fd(owner)
            raise RuntimeError("an event loop receives this process's signals; stop it first")
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        # Python's handlers wait until the main thread leaves its collective; this does not.
        signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        self._handlers = {sent: signal.signal(sent, _go_on) for sent in SIGNALS}
        _installed.append(self)
        threading.Thread(target=self._receive, daemon=True, name="stop requests").start()
        return self

    def close(self) -> None:
        """Receive no more: signals do again what they did before."""
        if self in _installed:
            _installed.remove(self)
            for sent, handler in self._handlers.items():
                signal.signal(sent, handler)
            signal.set_wakeup_fd(-1)
            os.write(self._pipe[1], b"\0")

    def __enter__(self) -> StopRequests:
        return self if self in _installed else self.install()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _receive(self) -> None:
        reading, writing = self._pipe
        while (number := os.read(reading, 1)[0]) != 0:
            if number in SIGNALS:  # Python writes those of other handlers, too
                self._received(signal.Signals(number))
        os.close(reading)
        os.close(writing)

    def _received(self, sent: signal.Signals) -> None:
        again = False
        if sent is signal.SIGTERM:
            now = time.monotonic()
            first, self._terminated_at = self._terminated_at, self._terminated_at or now
            again = first is not None and now - first >= self._same_request_s
        try:
            if self._on_signal is not None and self._on_signal(sent, again):
                return
        except Exception:
            # A request is not lost with what went wrong, nor are those to come.
            traceback.print_exc()
        if again:
            end_by(sent)
        self._asked.add(sent)

    def _stay_with_the_parent(self) -> None:
        for sent in SIGNALS:
            signal.signal(sent, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        for end in self._pipe:
            with contextlib.suppress(OSError):
                os.close(end)


def end_by(sent: signal.Signals) -> NoReturn:
    """End this process by the signal's default action; any thread may, unlike with ``signal``."""
    ctypes.CDLL(None).signal(int(sent), None)
    os.kill(os.getpid(), sent)
    while True:  # until another thread has taken it
        time.sleep(1)


def _go_on(_number: int, _frame: Any) -> None:
    """Handle a signal by nothing: the thread that reads the pipe does what there is to do."""


# A worker that is ended by SIGTERM must not write into the pipe that its parent reads: until it has
# other handlers it receives no signals.
_forking = threading.local()


def _before_fork() -> None:
    _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS if _installed else ())


def _after_fork() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


def _in_forked_child() -> None:
    for requests in _installed:
        requests._stay_with_the_parent()
    _installed.clear()
    _after_fork()


os.register_at_fork(
    before=_before_fork, after_in_parent=_after_fork, after_in_child=_in_forked_child
)
