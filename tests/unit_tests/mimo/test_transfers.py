# SPDX-License-Identifier: Apache-2.0
"""The order of copies, waits and releases on a stream of their own. One process, streams played.

A played stream runs nothing before somebody waits for it, as late as a real one might. Memory that
is released while a stream may still touch it is overwritten at once, as an allocator may do.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from megatron.core.models.mimo.memory import offload
from megatron.core.models.mimo.memory.offload import HostUse, OffloadedPart
from megatron.core.models.mimo.memory.transfers import AtOnce, SideStream, transfers_of

pytestmark = pytest.mark.once

GARBAGE = 0xEE


class Stream:
    """Work that is queued; it runs when somebody waits for it."""

    def __init__(self) -> None:
        self.queue: list[Callable[[], None]] = []
        self.done = self.queued = 0

    def add(self, work: Callable[[], None]) -> None:
        self.queue.append(work)
        self.queued += 1

    def run(self, until: int | None = None) -> None:
        while self.queue and (until is None or self.done < until):
            self.done += 1
            self.queue.pop(0)()

    def record_event(self) -> tuple[Stream, int]:
        return self, self.queued

    def wait_event(self, event: tuple[Stream, int]) -> None:
        self.add(lambda: event[0].run(event[1]))

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())


@dataclass
class Memory:
    """Bytes that outlive the tensors in them, as a device's do.

    Attributes:
        data: the bytes.
        tensors: of the storage that they were given out as.
        owner: the stream that allocated them; None for those of the host.
        users: streams that the allocator was told of.
    """

    data: bytearray
    tensors: StorageWeakRef
    owner: Stream | None
    users: list[Stream] = field(default_factory=list)

    def fill(self, value: int) -> None:
        self.data[:] = bytes([value]) * len(self.data)


class Streams:
    """What is asked of an accelerator, on the CPU."""

    def __init__(self) -> None:
        self.side, self.main = Stream(), Stream()
        self._in = self.main
        self._memories: list[Memory] = []

    def current(self) -> Stream:
        return self._in

    @contextlib.contextmanager
    def on_side(self) -> Iterator[None]:
        self._in = self.side
        yield
        self._in = self.main

    def empty_on_host(self, size: int) -> torch.Tensor:
        return self._allocate(size, None)

    def empty_on_device(self, size: int) -> torch.Tensor:
        return self._allocate(size, self._in)

    def copy(self, into: torch.Tensor, source: torch.Tensor) -> None:
        target, origin = self.memory(into), self.memory(source)

        def work() -> None:
            target.data[:] = origin.data

        self._in.add(work)

    def keep_until_done(self, data: torch.Tensor, stream: Stream) -> None:
        self.memory(data).users.append(stream)

    def memory(self, tensor: torch.Tensor) -> Memory:
        """Where a tensor lies."""
        wanted = StorageWeakRef(tensor.untyped_storage())
        (found,) = [m for m in self._memories if m.tensors == wanted]
        return found

    def reuse_released(self) -> None:
        """What no tensor lies in any more is written over by others.

        They run after the owner's work so far, and after that of the users.
        """
        gc.collect()
        for memory in self._memories:
            if memory.tensors.expired() and memory.owner is not None:
                for stream in (memory.owner, *memory.users):
                    stream.run()
                memory.fill(GARBAGE)

    def _allocate(self, size: int, owner: Stream | None) -> torch.Tensor:
        data = bytearray([GARBAGE]) * size
        tensor = torch.frombuffer(data, dtype=torch.uint8)
        self._memories.append(Memory(data, StorageWeakRef(tensor.untyped_storage()), owner))
        return tensor


def written(streams: Streams, value: int, size: int = 8) -> torch.Tensor:
    """Device memory that a kernel of the computing stream fills, when that runs."""
    data = streams.empty_on_device(size)
    memory = streams.memory(data)
    streams.main.add(lambda: memory.fill(value))
    return data


def reading(streams: Streams, data: torch.Tensor) -> bytearray:
    """What a kernel of the computing stream will find there, when that runs."""
    found, memory = bytearray(), streams.memory(data)
    streams.main.add(lambda: found.extend(memory.data))
    return found


@pytest.fixture
def streams() -> Streams:
    return Streams()


def test_bytes_go_to_the_host_and_back(streams: Streams):
    side = SideStream(streams)
    data = written(streams, 7)
    host = side.to_host(data)
    del data  # released while nothing has run yet
    streams.reuse_released()
    back, event = side.to_device(host)
    side.arrived(back, event)
    found = reading(streams, back)
    streams.main.run()
    assert found == bytes([7] * 8)


def test_a_copy_waits_for_what_writes_the_bytes(streams: Streams):
    data = written(streams, 7)
    host = SideStream(streams).to_host(data)
    streams.side.run()  # before anything else has run
    assert host.tolist() == [7] * 8


def test_nothing_waits_for_a_copy_before_it_is_needed(streams: Streams):
    side = SideStream(streams)
    data = written(streams, 7)
    host = side.to_host(data)
    side.to_device(host)
    streams.main.run()
    # The computation is through, the copies have not begun.
    assert streams.side.queue
    assert host.tolist() == [GARBAGE] * 8
    assert data.tolist() == [7] * 8


def test_copies_come_back_into_what_the_computation_released(streams: Streams):
    """An allocator reuses memory on one stream only, after that stream's work so far."""
    side = SideStream(streams)
    host = side.to_host(written(streams, 7))
    read = []
    streams.main.add(lambda: read.append(True))  # of the activation that lay there
    back, _ = side.to_device(host)
    assert streams.memory(back).owner is streams.main
    streams.side.run()
    assert read


def test_memory_of_a_copy_that_nobody_asked_for_is_kept_for_the_copy(streams: Streams):
    side = SideStream(streams)
    back, copy = side.to_device(side.to_host(written(streams, 7)))
    memory = streams.memory(back)
    del back, copy  # a step that was given up
    side.to_host(written(streams, 5))  # the next one
    streams.reuse_released()
    streams.side.run()
    assert bytes(memory.data) == bytes([GARBAGE] * 8)


def test_memory_that_came_back_is_kept_for_the_computation(streams: Streams):
    """On whichever stream reads it: backward runs where forward ran."""
    side = SideStream(streams)
    back, event = side.to_device(side.to_host(written(streams, 7)))
    streams._in = reader = Stream()
    side.arrived(back, event)
    found, memory = bytearray(), streams.memory(back)
    reader.add(lambda: found.extend(memory.data))
    del back, event  # autograd lets go before the kernel that reads it has run
    streams.reuse_released()
    reader.run()
    assert found == bytes([7] * 8)
    assert bytes(memory.data) == bytes([GARBAGE] * 8)  # the next owner's


class Reusing(Streams):
    """Released memory is given out again: in the order of the stream that it belongs to at once,
    that other streams were told of when their work is seen to be done. The host is ahead: nothing
    has run."""

    def empty_on_device(self, size: int) -> torch.Tensor:
        for memory in self._memories:
            seen = all(not stream.queue for stream in memory.users)
            if memory.owner is self._in and memory.tensors.expired() and seen:
                tensor = torch.frombuffer(memory.data, dtype=torch.uint8)
                memory.tensors, memory.users = StorageWeakRef(tensor.untyped_storage()), []
                return tensor
        return super().empty_on_device(size)

    def on_device(self) -> int:
        """Memories that the device has given out so far."""
        return sum(memory.owner is not None for memory in self._memories)


class Recorded(SideStream):
    """A control: the allocator is told of the side stream, nothing is kept."""

    def to_host(self, data: torch.Tensor) -> torch.Tensor:
        host = super().to_host(data)
        self._streams.keep_until_done(data, self._streams.side)
        self._leaving.clear()
        return host


@pytest.mark.parametrize("control", [False, True], ids=["", "control"])
def test_a_host_that_runs_ahead_needs_no_more_memory(control: bool):
    streams, layers, under_way = Reusing(), 40, 3
    side = Recorded(streams) if control else SideStream(streams, under_way=under_way)
    hosts = []
    for value in range(layers):
        data = written(streams, value)
        hosts.append(side.to_host(data))
        del data
    if control:
        assert streams.on_device() == layers
        return
    assert streams.on_device() == under_way + 1
    found = []
    for host in reversed(hosts):
        back, copy = side.to_device(host)
        side.arrived(back, copy)
        found.append(reading(streams, back))
        del back, copy
    assert streams.on_device() == under_way + 1
    streams.main.run()
    assert found == [bytes([value] * 8) for value in reversed(range(layers))]


def test_a_part_of_a_graph_over_played_streams(streams: Streams, monkeypatch):
    """All of it: storages shared by views, released, reloaded ahead, in the order of backward."""
    monkeypatch.setattr(offload, "transfers_of", lambda _: SideStream(streams))
    use = HostUse()
    part = OffloadedPart([], 0, use)
    packed = []
    for value in (3, 5):
        data = written(streams, value)
        packed.append([part._pack(data[:4]), part._pack(data[4:])])
        del data
    streams.reuse_released()
    part.start_reload()
    assert use.moved == 4 * 8
    for value, pair in zip((5, 3), reversed(packed), strict=True):
        found = []
        for each in pair:
            found.append(reading(streams, part._unpack(each)))
            streams.reuse_released()
        streams.main.run()
        assert found == [bytes([value] * 8)] * 2
    assert use.moved == 4 * 8


def test_where_the_device_is_the_host_copies_are_plain():
    transfers = transfers_of(torch.device("cpu"))
    assert isinstance(transfers, AtOnce)
    data = torch.arange(4, dtype=torch.uint8)
    host = transfers.to_host(data)
    back, event = transfers.to_device(host)
    transfers.arrived(back, event)
    assert back.tolist() == host.tolist() == data.tolist()
    assert len({t.data_ptr() for t in (data, host, back)}) == 3
