# SPDX-License-Identifier: Apache-2.0
"""Pipeline stages as threads in modelled time: stock's 1F1B over exchanges that are played.

What is started runs beside what a rank computes, and a rank that waits says for what: a call is
done when the last rank of its group has come. A send is done when its receiver takes it, as large
ones are on real transports, so a rank that is late keeps its neighbours waiting here, too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from megatron.core.models.mimo.pipeline.between_stages import NotedP2P
from tests.unit_tests.mimo import in_process_ranks
from tests.unit_tests.mimo.in_process_ranks import InProcessGroup
from tests.unit_tests.mimo.modelled_time import TimedWorld


class PipelinedWorld(TimedWorld):
    """Ranks whose started collectives and exchanges between stages wait for nobody else.

    Args:
        size, wire, patch: see :class:`.TimedWorld`.
    """

    def __init__(self, size: int, wire: float, patch: pytest.MonkeyPatch) -> None:
        super().__init__(size, wire, patch)
        self._begun: Counter[Any] = Counter()
        self._calls: dict[Any, _Call] = {}
        self._messages: dict[Any, _Message] = {}
        self._blocked: set[int] = set()
        patch.setattr(NotedP2P, "_communicate", lambda p2p, **given: self._stages(p2p, **given))

    def collective(self, name: str, group: InProcessGroup, *call: Any) -> None:
        """As started, and waited for."""
        self.start(name, group, *call).wait()

    def start(
        self,
        name: str,
        group: InProcessGroup,
        tensors: tuple[torch.Tensor, ...],
        work: Callable[[list[tuple[torch.Tensor, ...]]], None],
        same: bool = True,
    ) -> Any:
        """Enter a group's next collective; the last rank to come does the work."""
        rank = self._rank
        number, self._begun[rank, group.number] = self._begun[rank, group.number], (
            self._begun[rank, group.number] + 1
        )
        call = self._calls.setdefault((group.number, group.ranks, number), _Call(name, group.ranks))
        signature = (name, *((tuple(t.shape) if same else "any", t.dtype) for t in tensors))
        call.came[rank] = (signature, tensors, self.now[rank])
        if len(call.came) == len(group.ranks):
            calls = {member: call.came[member][0] for member in group.ranks}
            assert len(set(calls.values())) == 1, f"calls that do not fit together: {calls}"
            with torch.no_grad():
                work([call.came[member][1] for member in group.ranks])
            latest = max(time for _, _, time in call.came.values())
            for member in group.ranks:
                call.ends[member] = latest
                if name == "all_to_all":
                    call.ends[member] = self._wire + max(latest, self._free[member])
                    self._free[member] = call.ends[member]
                self.calls[member, name, group.ranks] += 1
            self._wake(group.ranks)
        return _Handle(self, call, rank)

    def until(self, done: Callable[[], bool], what: str) -> None:
        """Let the other ranks run until something is there."""
        while not done():
            self._blocked.add(self._rank)
            self._wait(what)

    def _wake(self, ranks: Any) -> None:
        for rank in self._blocked.intersection(ranks):
            self._blocked.remove(rank)
            del self._waiting[rank]
            self._ready.append(rank)

    def _stages(
        self,
        p2p: NotedP2P,
        *,
        tensor_send_next: torch.Tensor | None,
        tensor_send_prev: torch.Tensor | None,
        recv_prev: bool,
        recv_next: bool,
        **_: Any,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        """What stock's ``_communicate`` does: all of it at a time, and waited for."""
        rank, before, after = self._rank, p2p.prev_rank, p2p.next_rank
        mine: dict[str, _Message] = {}
        if tensor_send_next is not None:
            mine["send next"] = self._message("sent", "forward", rank, after, tensor_send_next)
        if tensor_send_prev is not None:
            mine["send prev"] = self._message("sent", "backward", rank, before, tensor_send_prev)
        if recv_prev:
            mine["prev"] = self._message("taken", "forward", before, rank)
        if recv_next:
            mine["next"] = self._message("taken", "backward", after, rank)
        self._wake((before, after))
        for name, message in mine.items():
            self.until(message.is_there, f"{name} of ranks {before} and {after}")
        times = [time for message in mine.values() for time in message.times.values()]
        self.now[rank] = max([self.now[rank], *times])
        return *(mine[n].tensor if n in mine else None for n in ("prev", "next")), None

    def _message(
        self, what: str, way: str, sender: int, receiver: int, tensor: torch.Tensor | None = None
    ) -> _Message:
        """The next one between two stages, which this rank has sent or taken."""
        number = self._begun[what, way, sender, receiver]
        self._begun[what, way, sender, receiver] += 1
        message = self._messages.setdefault((way, sender, receiver, number), _Message())
        message.times[what] = self.now[self._rank]
        if tensor is not None:
            message.tensor = tensor.detach().clone().requires_grad_()
        return message


@dataclass
class _Call:
    """A collective: what each rank that came brings, and when it is done on each."""

    name: str
    ranks: tuple[int, ...]
    came: dict[int, Any] = field(default_factory=dict)
    ends: dict[int, float] = field(default_factory=dict)


@dataclass
class _Message:
    """A tensor from one stage to another, there when both have asked for it."""

    times: dict[str, float] = field(default_factory=dict)
    tensor: Any = None

    def is_there(self) -> bool:
        """Whether it was sent and taken."""
        return len(self.times) == len(("sent", "taken"))


class _Handle:
    """Of a collective that a rank has started."""

    def __init__(self, world: PipelinedWorld, call: _Call, rank: int) -> None:
        self._world, self._call, self._rank = world, call, rank

    def wait(self) -> None:
        """Wait for the other ranks, and in modelled time for the end."""
        world, call, rank = self._world, self._call, self._rank
        assert in_process_ranks._here.rank == rank
        world.until(lambda: bool(call.ends), f"{call.name} over {call.ranks}")
        left = max(0.0, call.ends[rank] - world.now[rank])
        world.now[rank] += left
        if call.name == "all_to_all":
            world.waited[rank] += left
