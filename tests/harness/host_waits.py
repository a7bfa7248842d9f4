# SPDX-License-Identifier: Apache-2.0
"""Counts where the host would wait for a device, on a machine without one.

``PlayedDevice`` treats chosen tensors, and all that is computed from them, as if they lay on a
GPU: their ``device`` is ``cuda:0``, while their bytes stay in the host's memory. Inside ``watch()``
each operation that needs a value of theirs on the host is noted with its place::

    device = PlayedDevice()
    device.hold(model)
    with device.watch():
        model(device.upload(ids)).sum().backward()
    assert device.host_waits == []

Noted are ``item``, ``tolist``, ``numpy``, ``bool`` and the like; operations whose result's shape is
a value (``nonzero``, ``masked_select``, ``unique``, an index of bools, ``repeat_interleave`` with
no ``output_size``); ``equal``; copies to the host; and copies from the host that wait, those out of
pageable memory. Copies between pinned memory and the device that are ``non_blocking`` are not;
waiting for an event is. ``torch.cuda.set_sync_debug_mode`` counts the same on a GPU, events apart.

A tensor that is made by a call with an explicit ``device`` is where that says; where
``cpu_backend`` puts the CPU in place of CUDA, on the device.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.autograd.function import BackwardCFunction
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from megatron.core.models.mimo.transformer import context_parallel_attention

GPU, HOST = torch.device("cuda", 0), torch.device("cpu")
_ROOT = Path(__file__).parents[2]
# Frames of these are not where a wait comes from.
_NOT_A_PLACE = (str(Path(torch.__file__).parent), __file__, "cpu_backend.py", "stock_view.py")

_READS = {
    *("item", "tolist", "numpy", "__array__", "__bool__", "__int__", "__float__", "__index__"),
    *("__complex__", "__contains__", "is_nonzero", "__repr__", "__format__", "__reduce_ex__"),
}
_NEED_VALUES = {
    *("_local_scalar_dense", "nonzero", "nonzero_numpy", "argwhere", "masked_select", "equal"),
    "allclose",
    *("_unique", "_unique2", "unique_dim", "unique_consecutive", "is_nonzero", "bincount"),
}
_SHOWN = {torch.Tensor.device: GPU, torch.Tensor.is_cuda: True, torch.Tensor.is_cpu: False}
_INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
_FROM_HOST = {"tensor", "as_tensor", "from_numpy", "new_tensor"}


@dataclass(frozen=True)
class Wait:
    """One wait.

    Attributes:
        what: the operation.
        where: ``file:line function`` of its callers, innermost first.
    """

    what: str
    where: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.what} at {' < '.join(self.where)}"


class PlayedDevice:
    """A device that is the host's memory; one thread at a time watches.

    Attributes:
        device: what its tensors say that they are on.
        host_waits: what was noted, in order; a test puts marks of its own between.
    """

    def __init__(self) -> None:
        self.device, self.host_waits = GPU, list[Any]()
        # Weak references keep the keys, which are addresses, from being given out again.
        self._held: dict[int, StorageWeakRef] = {}
        self._pinned: dict[int, StorageWeakRef] = {}
        self._here = threading.local()

    def hold(self, *things: Any) -> None:
        """Have modules' weights, buffers and other tensors on the device, and those in dicts."""
        for thing in things:
            if isinstance(thing, torch.nn.Module):
                for module in thing.modules():
                    self.hold(vars(module), module._parameters, module._buffers)
                continue
            for tensor in tree_leaves(thing):
                if isinstance(tensor, torch.Tensor):
                    self._put(tensor, self._held)
                    if hasattr(tensor, "main_grad"):  # DDP's
                        self._put(tensor.main_grad, self._held)

    def upload(self, thing: Any) -> Any:
        """Return tensors, dicts of them too, in copies on the device."""
        if isinstance(thing, torch.Tensor):
            made = thing.detach().clone()
            self._put(made, self._held)
            return made
        if isinstance(thing, Mapping):
            return {name: self.upload(value) for name, value in thing.items()}
        return thing

    def holds(self, tensor: Any) -> bool:
        """Return whether a tensor is on the device."""
        return isinstance(tensor, torch.Tensor) and _key(tensor) in self._held

    @contextlib.contextmanager
    def watch(self) -> Iterator[list[Any]]:
        """Note waits of this thread, and show it the device, inside."""
        from megatron.core.models.mimo import cpu_backend  # where there is no CUDA

        device, current = self, cpu_backend._CPU

        class Event:
            def record(self, _stream: Any = None) -> None:
                """Nothing is outstanding."""

            def synchronize(self) -> None:
                device.note("Event.synchronize")

        causal = context_parallel_attention.causal_lower_right

        def bias(*lengths: int) -> Any:
            with _disable_current_modes():  # a subclass that cannot be made of another's tensor
                return causal(*lengths)

        class Stream:
            def record_event(self) -> Event:
                """Return one that has happened."""
                return Event()

        calls, backward = _Calls(self, current), BackwardCFunction.apply

        def apply(ctx: Any, *gradients: Any) -> Any:
            with calls:  # autograd leaves it out
                return backward(ctx, *gradients)

        with (
            mock.patch.object(torch.cuda, "Event", Event),
            mock.patch.object(torch.cuda, "current_stream", return_value=Stream()),
            mock.patch.object(BackwardCFunction, "apply", apply),
            mock.patch.object(dist.Work, "wait", self._collective(dist.Work.wait)),
            mock.patch.object(cpu_backend, "_CPU", GPU),  # where calls say "cuda"
            mock.patch.object(context_parallel_attention, "causal_lower_right", bias),
            calls,
            _Operations(self),
        ):
            yield self.host_waits

    def note(self, what: str) -> None:
        """Note a wait of the caller, unless it is part of one that was noted."""
        if not getattr(self._here, "noted", False):
            self.host_waits.append(Wait(what, _places()))

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Note nothing inside."""
        before, self._here.noted = getattr(self._here, "noted", False), True
        try:
            yield
        finally:
            self._here.noted = before

    def _collective(self, wait: Callable[..., Any]) -> Callable[..., Any]:
        """``wait`` of a collective, in which gloo copies."""

        def waited(*args: Any, **kwargs: Any) -> Any:
            self._here.collective = True
            try:
                return wait(*args, **kwargs)
            finally:
                self._here.collective = False

        return waited

    def _put(self, tensor: torch.Tensor, where: dict[int, StorageWeakRef]) -> None:
        key = _key(tensor)
        if key is not None:
            where[key] = StorageWeakRef(tensor.untyped_storage())

    def _copy_of(self, tensor: torch.Tensor, where: dict[int, StorageWeakRef] | None) -> Any:
        """A copy on the host, or as ``where`` says."""
        with self.noted():
            made = tensor.clone()
        self._held.pop(_key(made) or 0, None)
        if where is not None:
            self._put(made, where)
        return made


class RealDevice:
    """The same for this rank's GPU, where PyTorch itself raises at what waits.

    What is watched ends there. Waits for events, which PyTorch lets pass, are noted.
    """

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.host_waits = list[Any]()

    def hold(self, *things: Any) -> None:
        """Do nothing: it is there."""

    def upload(self, thing: Any) -> Any:
        """Return tensors, dicts of them too, on the device."""
        if isinstance(thing, Mapping):
            return {name: self.upload(value) for name, value in thing.items()}
        if not isinstance(thing, torch.Tensor):
            return thing
        on_host = thing.pin_memory() if thing.is_cpu else thing
        return on_host.to(self.device, non_blocking=True)

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Note nothing inside."""
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("default")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)

    @contextlib.contextmanager
    def watch(self) -> Iterator[list[Any]]:
        """Note the first operation that waits, and waits for events."""
        wait = torch.cuda.Event.synchronize

        def synchronize(event: Any) -> None:
            self.host_waits.append(Wait("Event.synchronize", _places()))
            wait(event)

        torch.cuda.set_sync_debug_mode("error")
        try:
            with mock.patch.object(torch.cuda.Event, "synchronize", synchronize):
                yield self.host_waits
        except RuntimeError as error:
            if "synchronizing CUDA operation" not in str(error):
                raise
            frames = traceback.extract_tb(error.__traceback__)
            places = [f"{each.filename}:{each.lineno} {each.name}" for each in reversed(frames)]
            self.host_waits.append(Wait(str(error), tuple(places)))
        finally:
            torch.cuda.set_sync_debug_mode("default")


def watched_device() -> PlayedDevice | RealDevice:
    """Return this rank's GPU, or a played one where there is none."""
    return RealDevice() if torch.cuda.is_available() else PlayedDevice()


def _key(tensor: torch.Tensor) -> int | None:
    try:
        return tensor.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):  # has none
        return None


class _Calls(TorchFunctionMode):
    """What Python calls: where tensors are, reads, copies, and what is made on a device."""

    def __init__(self, device: PlayedDevice, current: torch.device) -> None:
        super().__init__()
        # The latter is what torch.cuda.current_device() is in Megatron's modules.
        self._device, self._current = device, current

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        device, kwargs = self._device, dict(kwargs or {})
        name, owner = getattr(func, "__name__", ""), getattr(func, "__self__", None)
        first = args[0] if args else None
        held = device.holds(first)
        if name == "__get__":
            return _SHOWN[owner] if held and owner in _SHOWN else func(*args, **kwargs)
        if name in _READS and held:
            device.note(name)
            with device.noted():
                return func(*args, **kwargs)
        if name in ("to", "cpu", "cuda") and isinstance(first, torch.Tensor):
            return self._moved(func, name, args, kwargs)
        if name == "pin_memory":
            return device._copy_of(first, device._pinned)
        pinned = kwargs.pop("pin_memory", False)
        there = self._made_there(name, kwargs)
        if there is not None:
            kwargs["device"] = HOST
            if there and name in _FROM_HOST:
                device.note(f"{name}(device=)")
        made = func(*args, **kwargs)
        if isinstance(made, torch.Tensor) and (there or pinned):
            device._put(made, device._held if there else device._pinned)
        return made

    def _made_there(self, name: str, kwargs: dict[str, Any]) -> bool | None:
        """Whether a call makes its result on the device; None if it does not say."""
        wanted = kwargs.get("device")
        if wanted is None:
            return None
        return wanted is self._current or torch.device(wanted).type == GPU.type

    def _moved(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        device, (tensor, *rest) = self._device, args
        wanted = {"cpu": HOST, "cuda": GPU}.get(name)
        others: list[Any] = []
        for each in (*rest, kwargs.pop("device", None)):
            if isinstance(each, (str, torch.device)):
                wanted = torch.device(each)
            elif isinstance(each, torch.Tensor):
                wanted = each.device if not device.holds(each) else GPU
                others.append(each.dtype)
            elif each is not None:
                others.append(each)
        blocking, held = not kwargs.pop("non_blocking", False), device.holds(tensor)
        moved = tensor if name != "to" else torch.Tensor.to(tensor, *others, **kwargs)
        if wanted is None or (wanted.type == GPU.type) == held:
            return moved
        if held and blocking:
            device.note(f"{name}(host)")
        if not held and (blocking or _key(tensor) not in device._pinned):
            device.note(f"{name}(device) of pageable memory")
        return device._copy_of(moved, None if held else device._held)


class _Operations(TorchDispatchMode):
    """What is computed, forward and backward, and what of it needs values on the host."""

    def __init__(self, device: PlayedDevice) -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        device, kwargs = self._device, kwargs or {}
        if not any(map(device.holds, tree_leaves((args, kwargs)))):
            return func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        if name == "copy_" and not (device.holds(args[0]) and device.holds(args[1])):
            self._copied(*args, **kwargs)
            return func(*args, **kwargs)
        if self._waits(name, args, kwargs):
            device.note(name)
        made = func(*args, **kwargs)
        device.hold(made)
        for given, declared in zip(args, func._schema.arguments, strict=False):
            if declared.alias_info is not None and declared.alias_info.is_write:
                device.hold(given)
        return made

    def _copied(self, into: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> None:
        """Between the host and the device."""
        on_host = source if self._device.holds(into) else into
        if _in_collective() or getattr(self._device._here, "collective", False):
            self._device.hold(into, source)  # gloo's, which copies on the host
        elif not (non_blocking and _key(on_host) in self._device._pinned) and on_host.dim():
            self._device.note("copy_")

    def _waits(self, name: str, args: Any, kwargs: Mapping[str, Any]) -> bool:
        if name in _NEED_VALUES:
            return True
        if name == "repeat_interleave":
            repeats = args[-1] if isinstance(args[-1], torch.Tensor) else None
            return self._device.holds(repeats) and kwargs.get("output_size") is None
        if name not in _INDEXED:
            return False
        given = [each for each in args[1] if each is not None]
        masks = [each for each in given if each.dtype in (torch.bool, torch.uint8)]
        # PyTorch fills by a mask, and looks for no indices, where one value is put.
        filled = name != "index" and len(args[1]) == len(masks) == 1 and args[2].numel() == 1
        return bool(masks) and not filled


def _in_collective() -> bool:
    frame = sys._getframe(1)
    while frame is not None and any(part in frame.f_code.co_filename for part in _NOT_A_PLACE):
        if "/torch/distributed/" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


def _places(count: int = 6) -> tuple[str, ...]:
    """The innermost callers that are neither PyTorch's nor this file's."""
    frame, found = sys._getframe(1), []
    while frame is not None and len(found) < count:
        path = frame.f_code.co_filename
        if not any(part in path for part in _NOT_A_PLACE):
            with contextlib.suppress(ValueError):
                path = str(Path(path).relative_to(_ROOT))
            found.append(f"{path}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return tuple(found) or ("?",)
