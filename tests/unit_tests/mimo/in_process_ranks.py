# SPDX-License-Identifier: Apache-2.0
"""Ranks as threads of one process: the code of every rank runs, ``torch.distributed`` is played.

``InProcessWorld(n).run(body)`` calls ``body(rank)`` on ``n`` threads. While it runs, the functions
of ``torch.distributed`` that this project calls are replaced by ones that move tensors between
the threads; every other communicating function fails by name. 64 ranks take milliseconds, so
random layouts can be tried by the hundred.

One thread runs at a time and a seed chooses which, so a failure repeats exactly. A rank that
waits for a collective hands over; when nobody can go on the world says who waits for what, where
real ranks would hang. Unlike a real backend it compares the calls of a group's members: function,
shapes, dtype. Autograd's own threads are off: a backward runs on the thread of its rank.

What it cannot show: timing, transports, streams. Those need real processes.
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron.core.models.mimo.transformer import context_parallel_attention
from megatron.core.tensor_parallel import layers, mappings

T = TypeVar("T")

_here = threading.local()


@dataclass(frozen=True)
class InProcessGroup:
    """A process group as one rank holds it; ``number`` tells groups of the same ranks apart."""

    number: Any
    ranks: tuple[int, ...]
    own_rank: int

    def size(self) -> int:
        """Ranks of the group."""
        return len(self.ranks)

    def rank(self) -> int:
        """This rank's place in it; -1 for a rank outside, as in torch."""
        return self.ranks.index(self.own_rank) if self.own_rank in self.ranks else -1


class _Abandoned(BaseException):
    """Unwinds a rank that nobody will answer any more; no ``except Exception`` stops it."""


class InProcessWorld:
    """A world of ``size`` ranks; ``seed`` chooses the order in which they take turns.

    Attributes:
        calls: (rank, name, ranks of the group) -> number of collectives that were completed.
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        self.size = size
        self.calls: Counter[tuple[int, str, tuple[int, ...]]] = Counter()
        self.objects: dict[int, Any] = {}
        self._random = random.Random(seed)
        self._made: list[list[list[int]]] = []
        self._made_by: Counter[int] = Counter()
        self._own_groups: Counter[tuple[int, tuple[int, ...]]] = Counter()
        self._destroyed: set[tuple[int, Any]] = set()
        self._turns = [threading.Semaphore(0) for _ in range(size)]
        self._handed_back = threading.Semaphore(0)
        self._ready: list[int] = []
        self._waiting: dict[int, str] = {}
        self._open: dict[Any, dict[int, tuple[Any, ...]]] = {}
        self._errors: dict[int, BaseException] = {}
        # A new thread starts on the first GPU, whatever its maker's is.
        self._gpu = torch.cuda.current_device() if torch.cuda.is_available() else None
        self._over = False

    def run(self, body: Callable[[int], T]) -> list[T]:
        """``[body(0), body(1), ...]``, all ranks at once.

        Raises:
            BaseException: what the first failing rank raised.
            AssertionError: ranks wait for collectives that nobody completes, the calls of a
                group's members do not fit together, or ranks made different process groups.
        """
        results: list[Any] = [None] * self.size
        threads = [
            threading.Thread(target=self._rank_main, args=(rank, body, results), daemon=True)
            for rank in range(self.size)
        ]
        with _played():
            for thread in threads:
                thread.start()
            self._ready = list(range(self.size))
            while self._ready:
                self._give_turn(self._ready.pop(self._random.randrange(len(self._ready))))
            stuck = dict(self._waiting)
            self._over = True
            for rank in stuck:
                self._give_turn(rank)
            for thread in threads:
                thread.join()
        self._report(stuck)
        return results

    def counts(self, rank: int) -> dict[tuple[str, tuple[int, ...]], int]:
        """Collectives of one rank so far: (name, ranks of the group) -> count."""
        return {(name, ranks): n for (r, name, ranks), n in self.calls.items() if r == rank}

    def make_groups(self, enumeration: Sequence[Sequence[int]]) -> list[InProcessGroup]:
        """The groups of one ``new_subgroups_by_enumeration``; all ranks must ask for the same."""
        rank = _here.rank
        wanted = [sorted(ranks) for ranks in enumeration]  # torch numbers members by global rank
        index, self._made_by[rank] = self._made_by[rank], self._made_by[rank] + 1
        if index == len(self._made):
            self._made.append(wanted)
        assert self._made[index] == wanted, (
            f"rank {rank} makes {wanted} as its {index + 1}. set of process groups, another rank "
            f"made {self._made[index]}"
        )
        return [InProcessGroup((index, i), tuple(r), rank) for i, r in enumerate(wanted)]

    def make_own_group(self, ranks: Sequence[int]) -> InProcessGroup:
        """A group that its members alone make, each as its so-and-so-manieth over these ranks."""
        rank, members = _here.rank, tuple(sorted(ranks))
        assert rank in members, f"rank {rank} makes a group of {members} by itself"
        self._own_groups[rank, members] += 1
        return InProcessGroup((members, self._own_groups[rank, members]), members, rank)

    def everyone(self) -> InProcessGroup:
        """The default group."""
        return InProcessGroup("everyone", tuple(range(self.size)), _here.rank)

    def destroy_group(self, group: InProcessGroup) -> None:
        """This rank will not use the group again."""
        self._destroyed.add((_here.rank, group.number))

    def collective(
        self,
        name: str,
        group: InProcessGroup,
        tensors: tuple[torch.Tensor, ...],
        work: Callable[[list[tuple[torch.Tensor, ...]]], None],
        same: bool = True,
    ) -> None:
        """Wait for the group's other ranks; the last to come does the work on all tensors.

        ``same``: their shapes must be equal over the group; dtypes always.
        """
        rank = _here.rank
        assert isinstance(group, InProcessGroup), f"{name} on rank {rank} without a group: {group}"
        assert rank in group.ranks, f"{name} on rank {rank}, which is not in {group.ranks}"
        assert (rank, group.number) not in self._destroyed, f"{name} on a destroyed {group}"
        assert all(t.is_contiguous() for t in tensors), f"{name} on rank {rank} of a strided tensor"
        signature = (name, *((tuple(t.shape) if same else "any", t.dtype) for t in tensors))
        arrived = self._open.setdefault(group.number, {})
        arrived[rank] = (signature, tensors)
        if len(arrived) < group.size():
            self._wait(f"{name} over {group.ranks}")
            return
        del self._open[group.number]
        calls = {rank: call[0] for rank, call in sorted(arrived.items())}
        assert len(set(calls.values())) == 1, f"calls that do not fit together: {calls}"
        with torch.no_grad():
            work([arrived[member][1] for member in group.ranks])
        for member in group.ranks:
            self.calls[member, name, group.ranks] += 1
            if member != rank:
                del self._waiting[member]
                self._ready.append(member)

    def start(
        self,
        name: str,
        group: InProcessGroup,
        tensors: tuple[torch.Tensor, ...],
        work: Callable[[list[tuple[torch.Tensor, ...]]], None],
        same: bool = True,
    ) -> Any:
        """Begin a collective whose handle is waited for; here it is played at once."""
        self.collective(name, group, tensors, work, same)
        return _Done()

    def _rank_main(self, rank: int, body: Callable[[int], Any], results: list[Any]) -> None:
        _here.rank, _here.world = rank, self
        if self._gpu is not None:
            torch.cuda.set_device(self._gpu)
        self._turns[rank].acquire()
        try:
            with torch.autograd.set_multithreading_enabled(False):
                results[rank] = body(rank)
        except BaseException as error:  # carried to the caller of run()
            self._errors[rank] = error
        self._handed_back.release()

    def _give_turn(self, rank: int) -> None:
        self._turns[rank].release()
        self._handed_back.acquire()

    def _wait(self, what: str) -> None:
        rank = _here.rank
        self._waiting[rank] = what
        self._handed_back.release()
        self._turns[rank].acquire()
        if self._over:
            raise _Abandoned(what)

    def _report(self, stuck: dict[int, str]) -> None:
        failed = {r: e for r, e in self._errors.items() if not isinstance(e, _Abandoned)}
        if failed:
            raise failed[min(failed)]
        waits = ", ".join(f"rank {rank} in {what}" for rank, what in sorted(stuck.items()))
        assert not stuck, f"ranks would wait forever: {waits}"
        made = {self._made_by[rank] for rank in range(self.size)}
        assert len(made) == 1, f"ranks made different numbers of groups: {dict(self._made_by)}"


def _all_gather(
    output: torch.Tensor, block: torch.Tensor, group: Any = None, async_op: bool = False
) -> _Done | None:
    def work(tensors: list[tuple[torch.Tensor, ...]]) -> None:
        whole = torch.cat([block for _, block in tensors])
        for out, _ in tensors:
            out.view(whole.shape).copy_(whole)

    return _collective("all_gather", group, (output, block), work, async_op)


def _all_reduce(
    tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
) -> _Done | None:
    assert op == dist.ReduceOp.SUM, f"all_reduce with {op} is not played here"

    def work(tensors: list[tuple[torch.Tensor, ...]]) -> None:
        total = torch.stack([x for (x,) in tensors]).sum(0)
        for (x,) in tensors:
            x.copy_(total)

    return _collective("all_reduce", group, (tensor,), work, async_op)


def _broadcast(tensor: torch.Tensor, src: int, group: Any = None, async_op: bool = False) -> Any:
    def work(tensors: list[tuple[torch.Tensor, ...]]) -> None:
        (first,) = tensors[group.ranks.index(src)]
        for (x,) in tensors:
            x.copy_(first)

    return _collective("broadcast", group, (tensor,), work, async_op)


def _reduce_scatter(
    output: torch.Tensor,
    whole: torch.Tensor,
    op: Any = dist.ReduceOp.SUM,
    group: Any = None,
    async_op: bool = False,
) -> _Done | None:
    assert op == dist.ReduceOp.SUM, f"reduce_scatter with {op} is not played here"

    def work(tensors: list[tuple[torch.Tensor, ...]]) -> None:
        total = torch.stack([whole for _, whole in tensors]).sum(0)
        for (out, _), part in zip(tensors, total.chunk(len(tensors)), strict=True):
            out.copy_(part)

    return _collective("reduce_scatter", group, (output, whole), work, async_op)


def _all_to_all(
    output: torch.Tensor,
    rows: torch.Tensor,
    output_split_sizes: list[int] | None = None,
    input_split_sizes: list[int] | None = None,
    group: Any = None,
    async_op: bool = False,
) -> _Done | None:
    count, place = group.size(), group.rank()
    sent = input_split_sizes or [len(rows) // count] * count
    wanted = output_split_sizes or [len(output) // count] * count

    def work(tensors: list[tuple[torch.Tensor, ...]]) -> None:
        blocks = [rows.split(splits.tolist()) for _, rows, splits, _ in tensors]
        for receiver, (out, _, _, splits) in enumerate(tensors):
            parts = [from_rank[receiver] for from_rank in blocks]
            assert [len(part) for part in parts] == splits.tolist(), (
                f"all_to_all: rank {group.ranks[receiver]} waits for {splits.tolist()} rows and "
                f"is sent {[len(part) for part in parts]}"
            )
            out.copy_(torch.cat(parts))

    assert (len(sent), len(wanted)) == (count, count), f"splits of place {place}: {sent}, {wanted}"
    tensors = (output, rows, torch.tensor(sent), torch.tensor(wanted))
    return _collective("all_to_all", group, tensors, work, async_op, same=False)


def _all_gather_object(objects: list[Any], mine: Any, group: Any = None) -> None:
    group = group or _here.world.everyone()
    stated = _here.world.objects
    stated[_here.rank] = mine
    _collective("all_gather_object", group, (), lambda tensors: None, False)
    objects[:] = [stated[rank] for rank in group.ranks]
    # Nobody states the next object before all have read this one.
    _collective("all_gather_object", group, (), lambda tensors: None, False)


class _Done:
    """The handle of an asynchronous call, which was played before it returned."""

    def wait(self) -> None:
        """Nothing is left to do."""


def _collective(
    name: str,
    group: Any,
    tensors: tuple[torch.Tensor, ...],
    work: Callable[[list[tuple[torch.Tensor, ...]]], None],
    async_op: bool,
    same: bool = True,
) -> Any:
    detached = tuple(tensor.detach() for tensor in tensors)
    if async_op:
        return _here.world.start(name, group, detached, work, same)
    _here.world.collective(name, group, detached, work, same)
    return None


def _new_subgroups(
    ranks_per_subgroup_list: Sequence[Sequence[int]], backend: Any = None, **options: Any
) -> tuple[InProcessGroup | None, list[InProcessGroup]]:
    groups = _here.world.make_groups(ranks_per_subgroup_list)
    own = [group for group in groups if _here.rank in group.ranks]
    assert len(own) <= 1, f"rank {_here.rank} is in several subgroups: {own}"
    return own[0] if own else None, groups


def _new_group(
    ranks: Sequence[int], use_local_synchronization: bool = False, **options: Any
) -> InProcessGroup:
    assert use_local_synchronization, "new_group of the whole world is not played here"
    return _here.world.make_own_group(ranks)


def _rank_of(group: InProcessGroup | None = None) -> int:
    return _here.rank if group is None else group.rank()


def _size_of(group: InProcessGroup | None = None) -> int:
    return _here.world.size if group is None else group.size()


_PLAYED: dict[str, Callable[..., Any]] = {
    "is_initialized": lambda: True,
    "get_rank": _rank_of,
    "get_world_size": _size_of,
    "get_process_group_ranks": lambda group: list(group.ranks),
    "get_global_rank": lambda group, place: group.ranks[place],
    "get_backend_config": lambda group=None: "cpu:played",
    "new_group": _new_group,
    "new_subgroups_by_enumeration": _new_subgroups,
    "destroy_process_group": lambda group: _here.world.destroy_group(group),
    "all_gather_into_tensor": _all_gather,
    "all_gather_single": _all_gather,
    "all_reduce": _all_reduce,
    "broadcast": _broadcast,
    "reduce_scatter_tensor": _reduce_scatter,
    "reduce_scatter_single": _reduce_scatter,
    "all_gather_object": _all_gather_object,
    "all_to_all_single": _all_to_all,
}
_NOT_PLAYED = [
    *("all_gather", "all_gather_coalesced", "all_reduce_coalesced"),
    *("all_to_all", "barrier", "batch_isend_irecv"),
    *("broadcast_object_list", "gather", "gather_object", "irecv", "isend"),
    *("monitored_barrier", "new_subgroups", "recv", "recv_object_list", "reduce"),
    *("reduce_scatter", "scatter", "scatter_object_list", "send", "send_object_list"),
]
# Modules that keep a collective under a name of their own.
_BOUND_ELSEWHERE = [
    (context_parallel_attention, "_all_gather", _all_gather),
    (context_parallel_attention, "_reduce_scatter", _reduce_scatter),
    (mappings, "dist_all_gather_func", _all_gather),
    (mappings, "dist_reduce_scatter_func", _reduce_scatter),
    (layers, "dist_all_gather_func", _all_gather),
    (layers, "dist_reduce_scatter_func", _reduce_scatter),
]


def _refusal(name: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"torch.distributed.{name} is not played by InProcessWorld")

    return refuse


@contextlib.contextmanager
def _played() -> Iterator[None]:
    """The replacements are in place; ``WORLD_SIZE`` of a launcher is out of sight."""
    replaced = [(dist, name, function) for name, function in _PLAYED.items()]
    replaced += [(dist, name, _refusal(name)) for name in _NOT_PLAYED]
    replaced = [r for r in replaced if hasattr(dist, r[1])] + _BOUND_ELSEWHERE
    kept = [(module, name, getattr(module, name)) for module, name, _ in replaced]
    world_size = os.environ.pop("WORLD_SIZE", None)
    try:
        for module, name, function in replaced:
            setattr(module, name, function)
        yield
    finally:
        for module, name, function in kept:
            setattr(module, name, function)
        if world_size is not None:
            os.environ["WORLD_SIZE"] = world_size
