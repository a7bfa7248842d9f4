# SPDX-License-Identifier: Apache-2.0
"""Bytes between a device and host memory: at once, or on a stream of their own.

All that is asked of an accelerator is in :class:`DeviceStreams`; the order of copies, waits and
releases is in :class:`SideStream`, which tests run on streams that are played.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

HOST = torch.device("cpu")


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


class SideStream:
    """Copies beside the computation, on a stream of their own.

    Everything that touches the bytes on the host runs on that one stream, in order. So a copy back
    needs no wait for the copy that brought them.

    Args:
        streams: of the device.
    """

    def __init__(self, streams: DeviceStreams) -> None:
        self._streams = streams

    def to_host(self, data: torch.Tensor) -> torch.Tensor:
        """Copy when what writes ``data`` is done; its memory lives until the copy is."""
        host = self._streams.empty_on_host(data.numel())
        self._copy(host, data, on_device=data)
        return host

    def to_device(self, host: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Copy back, when what is computed so far is done.

        PyTorch reuses released memory on the stream alone that it was allocated on. So the bytes
        are the computing stream's, and lie where activations lay that its backward pass released.
        """
        data = self._streams.empty_on_device(host.numel())
        self._copy(data, host, on_device=data)
        return data, self._streams.side.record_event()

    def arrived(self, data: torch.Tensor, event: Any) -> None:
        """Let the stream that computes here wait for the copy, and the memory for that stream."""
        current = self._streams.current()
        current.wait_event(event)
        self._streams.keep_until_done(data, current)

    def _copy(self, into: torch.Tensor, source: torch.Tensor, *, on_device: torch.Tensor) -> None:
        """After what is computed so far; the memory ``on_device`` lives until the copy is done."""
        streams = self._streams
        streams.side.wait_stream(streams.current())
        with streams.on_side():
            streams.copy(into, source)
        streams.keep_until_done(on_device, streams.side)


@functools.cache
def transfers_of(device: torch.device) -> Transfers:
    """Return the transfers between a device and the host; one side stream per device."""
    return AtOnce() if device.type == HOST.type else SideStream(DeviceStreams(device))
