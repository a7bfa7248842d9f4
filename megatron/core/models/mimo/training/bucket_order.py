# SPDX-License-Identifier: Apache-2.0
"""Gradient buckets are reduced in one order on all ranks, whatever order backward fills them in.

With ``overlap_grad_reduce`` stock starts a bucket's reduction as soon as it is full. Where all
ranks run the same backward pass they all fill buckets in the same order. An encoder's ranks do not:
one without images fills them by the order in which weights were registered, one with images by the
order in which layers ran. An encoder that registers its layers in another order than it runs them
would then reduce one rank's first bucket with another rank's second.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from megatron.core.distributed import DistributedDataParallel


def reduce_in_one_order(wrapped: DistributedDataParallel) -> None:
    """Let a bucket's reduction wait until those of all buckets before it have started.

    Args:
        wrapped: a module's wrapper. Dense and expert buckets go over groups of their own and are
            ordered apart. Without ``overlap_grad_reduce`` stock starts them in order anyway.
    """
    if wrapped.ddp_config.overlap_grad_reduce:
        for groups in (wrapped.bucket_groups, wrapped.expert_parallel_bucket_groups):
            _Order(groups)


class _Order:
    """Starts the bucket groups of one step in turn, then those of the next step."""

    def __init__(self, groups: Sequence[Any]) -> None:
        self._groups = list(groups)
        self._asked: dict[int, dict[str, Any]] = {}
        self._next = 0
        for place, group in enumerate(groups):
            group.start_grad_sync = partial(self._ask, place)

    def _ask(self, place: int, **options: Any) -> None:
        self._asked[place] = options
        while self._next in self._asked:
            turn = self._next
            self._next = (turn + 1) % len(self._groups)
            group, options = self._groups[turn], self._asked.pop(turn)
            type(group).start_grad_sync(group, **options)
