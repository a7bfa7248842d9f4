# SPDX-License-Identifier: Apache-2.0
"""Items opened, decoded and made into an encoder's inputs, here or in processes beside."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

import numpy as np

from megatron.core.models.mimo.data.conversation import AnyItem, SampleError
from megatron.core.models.mimo.data.images import read_image

Inputs = Mapping[str, np.ndarray]
"""Name -> the encoder's input of some items."""
Make = Callable[[], Inputs]
Share = Callable[[Make], Inputs]
"""Returns what is made, here or by a rank that encodes the same items."""


def alone(make: Make) -> Inputs:
    """Return what is made: no other rank encodes these items."""
    return make()


class ReadError(RuntimeError):
    """An item cannot be read in the midst of a run, or who reads them is gone; one sentence."""


class Reader(Protocol):
    """Makes items into inputs."""

    def read(self, items: Sequence[AnyItem]) -> Inputs:
        """Return the inputs of at least one item.

        Raises:
            ReadError: an item cannot be read.
        """
        ...


class ImageReader:
    """Reads images as a model's processor makes them.

    Args:
        processor: its image processor.
        names: inputs that the encoder takes.

    Attributes:
        opened: names of the items that were read, in order; None if nobody counts.
    """

    def __init__(self, processor: Any, names: Sequence[str]) -> None:
        self._processor, self._names = processor, tuple(names)
        self.opened: list[str] | None = None

    def read(self, items: Sequence[AnyItem]) -> Inputs:
        """Return the inputs of at least one image.

        Raises:
            ReadError: an image cannot be read.
        """
        images = [self._image(item) for item in items]
        made = self._processor(images=images, return_tensors="np")
        return {name: np.asarray(made[name]) for name in self._names if name in made}

    def _image(self, item: AnyItem) -> Any:
        if self.opened is not None:
            self.opened.append(item.name)
        try:
            return read_image(item)
        except SampleError as error:
            raise ReadError(
                f"{item.name} cannot be read as an image: {error}; it was taken for one when the "
                "data was prepared, perhaps by its name alone: prepare it anew with "
                "look_at_images on, which skips what is none"
            ) from error


class ReaderProcesses:
    """Processes that read items; one that ends is an error, never a wait without end.

    They are forked, so it is made before process groups and CUDA are.

    Args:
        reader: what they read with.
        count: of them.

    Raises:
        ValueError: less than one process.
    """

    def __init__(self, reader: Reader, count: int) -> None:
        if count < 1:
            raise ValueError(f"{count} processes read nothing; give at least 1")
        context = multiprocessing.get_context("fork")
        self._ends: list[Connection] = []
        self._processes: list[Any] = []
        for _ in range(count):
            ours, theirs = context.Pipe()
            given = (reader, theirs, os.getpid())
            process = context.Process(target=_serve, args=given, daemon=True)
            process.start()
            theirs.close()
            self._ends.append(ours)
            self._processes.append(process)

    @property
    def pids(self) -> list[int]:
        """Of the processes."""
        return [process.pid for process in self._processes]

    def read(self, items: Sequence[AnyItem]) -> Inputs:
        """Return the inputs of at least one item, read by all processes together.

        Raises:
            ReadError: an item cannot be read, or a process is gone.
        """
        count = min(len(items), len(self._ends))
        cuts = [len(items) * part // count for part in range(count + 1)]
        for end, start, stop in zip(self._ends, cuts, cuts[1:], strict=False):
            with contextlib.suppress(OSError):  # a process that is gone is noticed below
                end.send(items[start:stop])
        answers = [self._answer(number) for number in range(count)]
        failed = [answer for answer in answers if isinstance(answer, str)]
        if failed:
            raise ReadError(failed[0])
        return {name: np.concatenate([each[name] for each in answers]) for name in answers[0]}

    def _answer(self, number: int) -> Any:
        end, process = self._ends[number], self._processes[number]
        ready = wait([end, process.sentinel])
        with contextlib.suppress(EOFError, OSError):
            if end in ready:
                return end.recv()
        process.join()
        code = process.exitcode
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        raise ReadError(
            f"process {process.pid}, which reads images for this rank, was {how}; if the machine "
            "ran out of memory, use fewer of them (data.workers)"
        )

    def close(self) -> None:
        """End the processes."""
        for end in self._ends:
            # Processes that were forked later hold the pipe open, so its end alone tells nothing.
            with contextlib.suppress(OSError):
                end.send(None)
        for process in self._processes:
            process.join(5)
            process.kill()


def _serve(reader: Reader, end: Connection, parent: int) -> None:
    """Answer until there is nothing more to read, or nobody to read for."""
    for sent in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(sent, signal.SIG_IGN)
    with contextlib.suppress(EOFError, OSError):
        while True:
            while not end.poll(5.0):
                if os.getppid() != parent:
                    return
            items = end.recv()
            if items is None:
                return
            try:
                end.send(dict(reader.read(items)))
            except Exception as error:  # told, not lost
                said = str(error) if isinstance(error, ReadError) else repr(error)
                end.send(said)
