# SPDX-License-Identifier: Apache-2.0
"""Ranks as threads whose computing and sending take modelled time: nobody looks at a clock.

Each rank has a time of its own. Computing adds to it; a collective ends for all when the last one
has come. An exchange of rows ends ``wire`` later than that, one after the other on each rank, and
costs a rank nothing until it waits. What real code in this world takes depends on its order alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from megatron.core.models.mimo.comm.exchange import Exchange
from tests.unit_tests.mimo import in_process_ranks
from tests.unit_tests.mimo.in_process_ranks import InProcessGroup, InProcessWorld


class TimedWorld(InProcessWorld):
    """Ranks with times of their own.

    Args:
        size: ranks.
        wire: what an exchange of rows takes.
        patch: how exchanges are watched; undone by whoever made it.

    Attributes:
        now: of each rank.
        waited: of each rank, for exchanges.
    """

    def __init__(self, size: int, wire: float, patch: pytest.MonkeyPatch) -> None:
        super().__init__(size)
        self.now, self.waited = [0.0] * size, [0.0] * size
        self._wire, self._free = wire, [0.0] * size
        self._started: Counter[Any] = Counter()
        self._came: dict[Any, dict[int, float]] = {}
        self._ends: dict[Exchange, float] = {}
        start, wait = Exchange.start, Exchange.wait

        def timed_start(exchange: Exchange, *arguments: Any) -> None:
            start(exchange, *arguments)
            self._ends[exchange] = self._free[self._rank]

        def timed_wait(exchange: Exchange) -> None:
            wait(exchange)
            rank, end = self._rank, self._ends.pop(exchange, 0.0)
            left = max(0.0, end - self.now[rank])
            self.now[rank] += left
            self.waited[rank] += left

        patch.setattr(Exchange, "start", timed_start)
        patch.setattr(Exchange, "wait", timed_wait)

    def collective(
        self,
        name: str,
        group: InProcessGroup,
        tensors: tuple[torch.Tensor, ...],
        work: Callable[[list[tuple[torch.Tensor, ...]]], None],
        same: bool = True,
    ) -> None:
        """As played, and timed."""
        rank = self._rank
        number = self._started[rank, group.number, group.ranks]
        self._started[rank, group.number, group.ranks] += 1
        came = self._came.setdefault((group.number, group.ranks, number), {})
        came[rank] = self.now[rank]
        super().collective(name, group, tensors, work, same)
        latest = max(came.values())
        if name == "all_to_all":
            self._free[rank] = self._wire + max(latest, self._free[rank])
        else:
            self.now[rank] = max(self.now[rank], latest)

    def takes(self, module: nn.Module, forward: float, backward: float) -> None:
        """Say what a module of the running rank takes; its first argument is what comes out."""
        rank = self._rank

        def spend(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
            self.now[rank] += forward
            return _Backward.apply(output, self.now, rank, backward)

        module.register_forward_hook(spend)

    @property
    def _rank(self) -> int:
        return in_process_ranks._here.rank


class _Backward(torch.autograd.Function):
    """Nothing forward; backward takes time."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, now: list[float], rank: int, takes: float) -> Any:
        ctx.spent = now, rank, takes
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        now, rank, takes = ctx.spent
        now[rank] += takes
        return gradient, None, None, None
