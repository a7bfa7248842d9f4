# SPDX-License-Identifier: Apache-2.0
"""What a rank is doing, kept where others can read it even if the rank is stuck or dead.

The library marks where a training step goes from one phase to the next: a few bytes in memory, no
collective, nothing on the device. With :func:`record_into` these bytes are a small mapped file.
The kernel keeps it when the process is killed, and any process of the host reads it while the rank
is stopped or waits inside a collective. Pure bookkeeping: this module imports neither torch nor
Megatron-Core.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

START = "start"
DATA = "data"
INPUT_EXCHANGE = "encoder input exchange"
ENCODER_FORWARD = "encoder forward"
BRIDGE_FORWARD = "bridge forward"
LANGUAGE_FORWARD = "language forward"
LANGUAGE_BACKWARD = "language backward"
BRIDGE_BACKWARD = "bridge backward"
ENCODER_BACKWARD = "encoder backward"
FINALIZE = "gradient finalisation"
OPTIMIZER = "optimizer step"
BETWEEN = "between steps"
SAVE = "checkpoint save"
LOAD = "checkpoint load"

PHASES = (
    START, DATA, INPUT_EXCHANGE, ENCODER_FORWARD, BRIDGE_FORWARD, LANGUAGE_FORWARD,
    LANGUAGE_BACKWARD, BRIDGE_BACKWARD, ENCODER_BACKWARD, FINALIZE, OPTIMIZER, BETWEEN, SAVE, LOAD,
)  # fmt: skip
"""Phases that the library marks; a job may mark others (up to 40 bytes)."""

_MAGIC = b"MIMOPH01"
# Magic; rank, pid, the process's start in clock ticks; when, step, microbatch, kind of step, phase,
# wait (JSON), then the latest marks in turn. Fixed places: a mark overwrites its part and nothing
# has to be flushed.
_OWNER = struct.Struct("<8siiq")
_PLACE = struct.Struct("<dqi16s40s")
_WAIT = struct.Struct("<256s")
_PLACE_AT, _WAIT_AT = _OWNER.size, _OWNER.size + _PLACE.size
_PAST_AT = _WAIT_AT + _WAIT.size
# Marks that are remembered: a step of 30 microbatches has about so many.
_PAST = 400
SIZE = _PAST_AT + _PAST * _PLACE.size
_NAME = "phase_{rank}.bin"


@dataclass(frozen=True)
class Wait:
    """A wait that PyTorch's flight recorder may not record, such as one between two ranks.

    Attributes:
        kind: what it waits in, such as ``"receive"``.
        peers: the global ranks that it waits for.
        group: name of the process group.
    """

    kind: str
    peers: tuple[int, ...]
    group: str


@dataclass(frozen=True)
class Place:
    """Where one rank was when it last marked anything.

    Attributes:
        rank: global rank.
        pid, started: its process on its host, and when that began (clock ticks since boot; 0 where
            the system does not say). Together they are never those of another process.
        at: seconds since the epoch.
        step: number of the step, -1 if the job tells none.
        kind: of the step: ``"step"``, ``"evaluation batch"``.
        microbatch: of the step, -1 outside of any.
        phase: one of :data:`PHASES`, or the job's own.
        wait: what it waits in, see :class:`Wait`; usually ``None``.
        past: where it was at its latest 400 marks, the oldest first.
    """

    rank: int
    pid: int = 0
    started: int = 0
    at: float = 0.0
    step: int = -1
    kind: str = "step"
    microbatch: int = -1
    phase: str = START
    wait: Wait | None = None
    past: tuple[Place, ...] = field(default=(), repr=False, compare=False)

    def as_of(self, seconds: float) -> Place | None:
        """Return where the rank was at a time (since the epoch); ``None`` before its past."""
        return next((each for each in reversed(self.past) if each.at <= seconds), None)

    def passed(self, place: Place) -> Place | None:
        """Return when the rank was last in the same phase of the same microbatch, if it was."""
        return next((each for each in reversed(self.past) if each.words() == place.words()), None)

    def words(self) -> str:
        """Return the place in words.

        >>> Place(3, step=12, microbatch=1, phase="bridge backward").words()
        "the phase 'bridge backward' of step 12, microbatch 1"
        """
        step = f" of {self.kind} {self.step}" if self.step >= 0 else ""
        microbatch = f", microbatch {self.microbatch}" if step and self.microbatch >= 0 else ""
        return f"the phase '{self.phase}'{step}{microbatch}"

    def process_state(self) -> str:
        """Return what the rank's process does, by its letter in ``/proc``: ``"T"`` is stopped.

        ``""`` if it is gone (a zombie is), or the system does not say.
        """
        state, started = _process(self.pid)
        return state if started == self.started and state not in ("Z", "X") else ""


class _Own:
    """This process's place; all marks go through the one instance of it."""

    def __init__(self) -> None:
        self.buffer: Any = bytearray(SIZE)
        self.phase, self.kind = START, "step"
        self.step = self.microbatch = -1
        self.forwards = 0
        self.wait: Wait | None = None
        self.marks = 0
        self._encoded: dict[str, bytes] = {}

    def write(self) -> None:
        names = self._encoded.get(self.phase) or self._encode(self.phase)
        kind = self._encoded.get(self.kind) or self._encode(self.kind)
        now, past_at = time.time(), _PAST_AT + self.marks % _PAST * _PLACE.size
        self.marks += 1
        # The past first: who is killed in between is where the last whole mark says.
        for at in (past_at, _PLACE_AT):
            _PLACE.pack_into(self.buffer, at, now, self.step, self.microbatch, kind, names)

    def write_wait(self) -> None:
        wait = self.wait
        text = b"" if wait is None else json.dumps([wait.kind, wait.peers, wait.group]).encode()
        _WAIT.pack_into(self.buffer, _WAIT_AT, text if len(text) <= _WAIT.size else b"")

    def _encode(self, name: str) -> bytes:
        return self._encoded.setdefault(name, name.encode())


_own = _Own()
_observers: list[Callable[[str], None]] = []


def observe(observer: Callable[[str], None]) -> None:
    """Call ``observer`` with the phase at every mark from now on, in the thread that marks."""
    _observers.append(observer)


def stop_observing(observer: Callable[[str], None]) -> None:
    """Call ``observer`` no more; one that is not called does nothing here."""
    if observer in _observers:
        _observers.remove(observer)


def mark(phase: str, microbatch: int | None = None) -> None:
    """Enter ``phase``, and ``microbatch`` if one is given."""
    for observer in _observers:
        observer(phase)
    _own.phase = phase
    if microbatch is not None:
        _own.microbatch = microbatch
    _own.write()


@contextlib.contextmanager
def during(phase: str) -> Iterator[None]:
    """Enter ``phase``, afterwards the phase from before. An error leaves the phase as it is."""
    before = _own.phase
    mark(phase)
    yield
    mark(before)


@contextlib.contextmanager
def waiting(kind: str, peers: Sequence[int], group: str) -> Iterator[None]:
    """Say that this rank waits for ``peers``, inside; an error leaves the record as it is."""
    _own.wait = Wait(kind, tuple(peers), group)
    _own.write_wait()
    yield
    _own.wait = None
    _own.write_wait()


def at_step(step: int, kind: str = "step") -> None:
    """Begin a step; jobs call it, the library does not count steps.

    Args:
        step: its number.
        kind: what it is, in words that a number follows: ``"step"``, ``"evaluation batch"``.
    """
    _own.step, _own.kind, _own.microbatch, _own.forwards = step, kind, -1, 0
    _own.write()


def next_microbatch() -> int:
    """Begin another forward pass of this step; return its number, from 0."""
    _own.microbatch, _own.forwards = _own.forwards, _own.forwards + 1
    return _own.microbatch


def end_of_microbatches() -> None:
    """Say that what follows belongs to the whole step."""
    _own.microbatch, _own.forwards = -1, 0


def when_gradient_arrives(tensor: Any, phase: str, microbatch: int | None = None) -> Any:
    """Return ``tensor``; its backward pass marks ``phase`` there. Return others as they are."""
    if getattr(tensor, "requires_grad", False):
        number = _own.microbatch if microbatch is None else microbatch

        def hook(_gradient: Any) -> None:
            mark(phase, number)

        tensor.register_hook(hook)
    return tensor


def here() -> Place:
    """Return this rank's place."""
    return _read(bytes(_own.buffer))


def record_into(folder: str | Path, rank: int) -> Path:
    """Keep this rank's place in a file below ``folder`` from now on; returns the file.

    The folder is best on this host: what a dead host had not written yet, a network file system
    does not show to others.
    """
    path = Path(folder) / _NAME.format(rank=rank)
    with path.open("wb+") as file:
        file.truncate(SIZE)
        buffer = mmap.mmap(file.fileno(), SIZE)
    pid = os.getpid()
    _OWNER.pack_into(buffer, 0, _MAGIC, rank, pid, _process(pid)[1])
    _own.buffer = buffer
    _own.write()
    _own.write_wait()
    return path


def read_places(folder: str | Path, past: bool = True) -> dict[int, Place]:
    """Return every place recorded below ``folder``, by rank, without files that are not whole.

    Args:
        folder: of :func:`record_into`.
        past: with where each rank was before; without it is cheap, for polling.
    """
    found = {}
    for path in Path(folder).glob(_NAME.format(rank="*")):
        content = path.read_bytes()
        if len(content) == SIZE and content.startswith(_MAGIC):
            place = _read(content, past)
            found[place.rank] = place
    return found


def _read(content: bytes, with_past: bool = True) -> Place:
    _, rank, pid, started = _OWNER.unpack_from(content, 0)
    (wait,) = _WAIT.unpack_from(content, _WAIT_AT)

    def marked(at: int) -> Place:
        at_s, step, microbatch, kind, phase = _PLACE.unpack_from(content, at)
        return Place(rank, pid, started, at_s, step, _text(kind), microbatch, _text(phase))

    past = map(marked, range(_PAST_AT, SIZE, _PLACE.size) if with_past else ())
    return replace(
        marked(_PLACE_AT),
        wait=_read_wait(wait),
        past=tuple(sorted((each for each in past if each.at), key=lambda each: each.at)),
    )


def _read_wait(content: bytes) -> Wait | None:
    try:
        kind, peers, group = json.loads(_text(content))
        return Wait(kind, tuple(peers), group)
    except ValueError:  # none, or one that is being written
        return None


def _text(content: bytes) -> str:
    return content.rstrip(b"\0").decode(errors="replace")


def _process(pid: int) -> tuple[str, int]:
    """(state, start in clock ticks) of a process; ``("", 0)`` if there is none to ask about."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[0], int(fields[19])
    except (OSError, ValueError, IndexError):
        return "", 0
