# SPDX-License-Identifier: Apache-2.0
"""Bytes between a device and host memory: at once, or on a stream of their own.

All that is asked of an accelerator is in :class:`DeviceStreams`; the order of copies, waits and
releases is in :class:`SideStream`, which tests run on streams that are played.
"""

from __future__ import annotations

import functools
from collections import deque
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

HOST = torch.device("cpu")
UNDER_WAY = 8
"""Storages that are on their way to the host, at most, for which the computation does not wait."""


class Transfers(Protocol):
    """How storages travel, as flat tensors of bytes."""

    def to_host(self, data: torch.Tensor) -> torch.Tensor:
        """Start copying; ``data`` may be released at once. Returns the bytes on the host."""
        ...

    def to_device(self, host: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Start copying back; (the bytes on the device, what :meth:`arrived` needs to know)."""
        ...

    def arrived(self, data: torch.Tensor, event: Any) -> None:
        """Let the caller's stream read, from here on, what :meth:`to_device` returned."""


class AtOnce:
    """Where the device is the host itself: plain copies.

    Those "on the host" lie in NumPy's memory, so that PyTorch's allocator counts the device's part
    here as it does on an accelerator.
    """

    def to_host(self, data: torch.Tensor) -> torch.Tensor:
        """Return a copy."""
        return torch.from_numpy(data.numpy().copy())

    def to_device(self, host: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Return another copy; the one on the host stays what it is."""
        return host.clone(), None

    def arrived(self, data: torch.Tensor, event: None) -> None:
        """Do nothing: it is there."""


class DeviceStreams:
    """One accelerator's streams.

    Args:
        device: the accelerator.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._module = torch.get_device_module(device)
        self.side = self._module.Stream(device=device)

    def current(self) -> Any:
        """Return the stream that computes."""
        return self._module.current_stream(self._device)

    def on_side(self) -> AbstractContextManager[Any]:
        """Give work and memory to the side stream, inside."""
        return self._module.stream(self.side)

    def empty_on_host(self, size: int) -> torch.Tensor:
        """Return page-locked bytes, which a copy can run from and to beside the host's work.

        PyTorch keeps released ones for the next copy, and until copies from and to them have ended.
        """
        return torch.empty(size, dtype=torch.uint8, device=HOST, pin_memory=True)

    def empty_on_device(self, size: int) -> torch.Tensor:
        """Return bytes that belong to the stream in whose context this is called."""
        return torch.empty(size, dtype=torch.uint8, device=self._device)

    def copy(self, into: torch.Tensor, source: torch.Tensor) -> None:
        """Copy on the stream in whose context this is called; the host goes on."""
        into.copy_(source, non_blocking=True)

    def keep_until_done(self, data: torch.Tensor, stream: Any) -> None:
        """Use the memory, once released, again only after ``stream``'s work so far."""
        data.record_stream(stream)


@dataclass(frozen=True, eq=False)
class _Copy:
    """A copy that the side stream was given, and the device's bytes that it reads or writes.

    Attributes:
        data: the bytes on the device.
        stream: the one that they belong to.
        done: the event of the copy.
    """

    data: torch.Tensor
    stream: Any
    done: Any


class SideStream:
    """Copies beside the computation, on a stream of their own.

    Everything that touches the bytes on the host runs on that one stream, in order. So a copy back
    needs no wait for the copy that brought them.

    The allocator is not told of the side stream: it would give memory out again only when it sees
    that a copy has *ended*, and a host that is far ahead of the device asks for more before that.
    Instead the bytes of the latest copies stay referenced, and the computing stream waits for a
    copy before its bytes are let go. So memory is used again in the order of that stream, however
    far ahead the host is.

    Args:
        streams: of the device.
        under_way: copies to the host whose bytes on the device are not let go yet, at most. The
            computation waits for the one before them.
    """

    def __init__(self, streams: DeviceStreams, under_way: int = UNDER_WAY) -> None:
        self._streams, self._under_way = streams, under_way
        self._leaving: deque[_Copy] = deque()
        self._coming: set[_Copy] = set()

    def to_host(self, data: torch.Tensor) -> torch.Tensor:
        """Copy when what writes ``data`` is done; its memory lives until the copy is."""
        # Nobody asked for these: their step was given up.
        while self._coming:
            self._let_go(self._coming.pop())
        host = self._streams.empty_on_host(data.numel())
        self._leaving.append(self._copy(host, data, on_device=data))
        while len(self._leaving) > self._under_way:
            self._let_go(self._leaving.popleft())
        return host

    def to_device(self, host: torch.Tensor) -> tuple[torch.Tensor, _Copy]:
        """Copy back, when what is computed so far is done.

        PyTorch reuses released memory on the stream alone that it was allocated on. So the bytes
        are the computing stream's, and lie where activations lay that its backward pass released.
        """
        data = self._streams.empty_on_device(host.numel())
        copy = self._copy(data, host, on_device=data)
        self._coming.add(copy)
        return data, copy

    def arrived(self, data: torch.Tensor, event: _Copy) -> None:
        """Let the stream that computes here wait for the copy, and the memory for that stream."""
        current = self._streams.current()
        current.wait_event(event.done)
        if current != event.stream:
            self._streams.keep_until_done(data, current)
        self._coming.discard(event)
        # Those went before on the same stream, so this waits for nothing more.
        while self._leaving:
            self._let_go(self._leaving.popleft())

    def _copy(self, into: torch.Tensor, source: torch.Tensor, *, on_device: torch.Tensor) -> _Copy:
        """Copy after what is computed so far."""
        streams = self._streams
        computing = streams.current()
        streams.side.wait_stream(computing)
        with streams.on_side():
            streams.copy(into, source)
        return _Copy(on_device, computing, streams.side.record_event())

    def _let_go(self, copy: _Copy) -> None:
        copy.stream.wait_event(copy.done)


@functools.cache
def transfers_of(device: torch.device) -> Transfers:
    """Return the transfers between a device and the host; one side stream per device."""
    return AtOnce() if device.type == HOST.type else SideStream(DeviceStreams(device))
