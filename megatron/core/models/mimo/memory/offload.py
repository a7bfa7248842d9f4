# SPDX-License-Identifier: Apache-2.0
"""What autograd keeps for a part's backward pass, moved to host memory and back.

A storage is copied once, however many tensors that are kept lie in it (the query, key and value of
one projection). Weights and buffers stay, since they do not go away, and so does what is small.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from megatron.core.models.mimo.memory.transfers import Transfers, transfers_of


@dataclass
class HostUse:
    """Host memory of one modality's activations, in bytes.

    Attributes:
        now, most: held at the moment, and at most so far.
        moved: copied so far, in both directions together.
    """

    now: int = 0
    most: int = 0
    moved: int = 0

    def take(self, size: int) -> None:
        """Count a copy to the host."""
        self.now += size
        self.moved += size
        self.most = max(self.most, self.now)

    def give(self, size: int) -> None:
        """Count a copy on the host that is no longer needed."""
        self.now -= size


class _HostCopy:
    """One storage on the host; lives as long as a tensor in it is kept."""

    def __init__(self, data: torch.Tensor, use: HostUse) -> None:
        self._transfers: Transfers = transfers_of(data.device)
        self._size, self._use = data.numel(), use
        self._host = self._transfers.to_host(data)
        self._loaded: Any = None  # the bytes on the device, and what ``arrived`` needs to know
        self.tensors = self._taken = 0
        use.take(self._size)
        weakref.finalize(self, use.give, self._size)

    def start_reload(self) -> None:
        """Start copying back, if nobody has."""
        if self._loaded is None:
            self._loaded = self._transfers.to_device(self._host)
            self._use.moved += self._size

    def take(self) -> torch.UntypedStorage:
        """The storage, for one of the tensors in it; released here when all have asked."""
        self.start_reload()
        data, event = self._loaded
        self._transfers.arrived(data, event)
        self._taken += 1
        if self._taken == self.tensors:  # a second backward pass copies anew
            self._taken, self._loaded = 0, None
        return data.untyped_storage()


@dataclass(eq=False)
class _Kept:
    """A tensor that autograd keeps: where it lies in which copy."""

    copy: _HostCopy
    dtype: torch.dtype
    offset: int
    size: torch.Size
    stride: tuple[int, ...]


class OffloadedPart:
    """What one forward pass has on the host.

    Args:
        stays: tensors whose storages are left alone: weights and buffers.
        smallest: bytes of the smallest storage that is moved.
        use: counts the host's bytes.
        before: the forward pass before this one, which runs backward after it.
    """

    def __init__(
        self,
        stays: Iterable[torch.Tensor],
        smallest: int,
        use: HostUse,
        before: OffloadedPart | None = None,
    ) -> None:
        self._stays = {StorageWeakRef(tensor.untyped_storage()) for tensor in stays}
        self._smallest, self._use = smallest, use
        # Weak references: another storage cannot be taken for one that is gone.
        self._copies: dict[StorageWeakRef, weakref.ref[_HostCopy]] = {}
        self._before = (lambda: None) if before is None else weakref.ref(before)
        self._kept = self._asked = 0
        self._started = False

    def hooks(self) -> AbstractContextManager[Any]:
        """Send what autograd keeps to the host, inside."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def start_reload(self) -> None:
        """Start copying all of it back, what backward needs first at first; once is enough."""
        if self._started:
            return
        self._started = True
        for copy in reversed([reference() for reference in self._copies.values()]):
            if copy is not None:
                copy.start_reload()

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | tuple[_Kept, OffloadedPart]:
        storage = tensor.untyped_storage() if _is_plain(tensor) else None
        if storage is None or storage.nbytes() < max(self._smallest, 1):
            return tensor.detach()
        key = StorageWeakRef(storage)
        if key in self._stays:
            return tensor.detach()
        copy = self._copies[key]() if key in self._copies else None
        if copy is None:
            copy = _HostCopy(_bytes_of(storage, tensor.device), self._use)
            self._copies[key] = weakref.ref(copy)
        copy.tensors += 1
        self._kept += 1
        where = int(tensor.storage_offset()), tensor.size(), tensor.stride()
        return _Kept(copy, tensor.dtype, *where), self

    def _unpack(self, packed: torch.Tensor | tuple[_Kept, OffloadedPart]) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        kept, _ = packed
        self.start_reload()
        storage = kept.copy.take()
        self._asked += 1
        if self._asked == self._kept:
            self._asked, self._started = 0, False
            if (before := self._before()) is not None:
                before.start_reload()
        flat = torch.empty(0, dtype=kept.dtype, device=storage.device)
        return flat.set_(storage, kept.offset, kept.size, kept.stride)


def reload_when_needed(rows: torch.Tensor, part: OffloadedPart | None) -> torch.Tensor:
    """Return ``rows``; when their gradient is there, the part begins to come back.

    Args:
        rows: an encoder's rows as the bridge hands them on, so that copies run beside its
            exchange of gradients.
        part: of the forward pass that made them; None for none.
    """
    if part is not None and rows.requires_grad:
        start: Callable[[torch.Tensor], None] = lambda _: part.start_reload()  # noqa: E731
        rows.register_hook(start)
    return rows


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether the tensor is its storage, seen through sizes and strides, and nothing else."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout != torch.strided:
        return False
    return not (tensor.is_conj() or tensor.is_neg())


def _bytes_of(storage: torch.UntypedStorage, device: torch.device) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
