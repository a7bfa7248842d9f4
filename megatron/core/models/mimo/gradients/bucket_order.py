# SPDX-License-Identifier: Apache-2.0
"""Gradient buckets are reduced in one order on all ranks, whatever order backward fills them in.

With ``overlap_grad_reduce`` stock starts a bucket's reduction as soon as it is full. Where all
ranks run the same backward pass they all fill buckets in the same order. An encoder's ranks do not:
one without images fills them by the order in which weights were registered, one with images by the
order in which layers ran. An encoder that registers its layers in another order than it runs them
would then reduce one rank's first bucket with another rank's second.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.mimo.wrappers import clean_name


def reduce_in_one_order(wrapped: DistributedDataParallel) -> None:
    """Let a bucket's reduction wait until those of all buckets before it have started.

    Args:
        wrapped: a module's wrapper. Dense and expert buckets go over groups of their own and are
            ordered apart. Without ``overlap_grad_reduce`` stock starts them in order anyway.
    """
    if wrapped.ddp_config.overlap_grad_reduce:
        names = {each: clean_name(wrapped, name) for name, each in wrapped.named_parameters()}
        for groups in (wrapped.bucket_groups, wrapped.expert_parallel_bucket_groups):
            _Order(groups, names)


class _Order:
    """Starts the bucket groups of one step in turn.

    Stock knows a bucket to be full by how many gradients its weights got in the first step. Those
    of a later step may be more, where layers have a backward pass of their own for every time that
    they ran. What comes after the reduction was asked for would be missing from the sum.
    """

    def __init__(self, groups: Sequence[Any], names: Mapping[torch.nn.Parameter, str]) -> None:
        self._groups, self._names = list(groups), names
        self._asked: dict[int, dict[str, Any]] = {}
        self._full: set[int] = set()
        self._next = 0
        for place, group in enumerate(groups):
            group.start_grad_sync = partial(self._ask, place)
            group.register_grad_ready = partial(self._ready, place)
            group.reset = partial(self._reset, group)

    def _reset(self, group: Any) -> None:
        """A step begins; of one that was given up nothing stays."""
        self._asked.clear()
        self._full.clear()
        self._next = 0
        type(group).reset(group)

    def _ready(self, place: int, parameter: torch.nn.Parameter, *args: Any, **kwargs: Any) -> None:
        group = self._groups[place]
        if place in self._full and group.is_last_microbatch:
            raise ValueError(
                f"parameter '{self._names[parameter]}' got one more gradient after the reduction "
                "of its bucket had started: it gets more in this step than in the first one, as "
                "in layers that are recomputed with a backward pass of their own and run a "
                "varying number of times. Set overlap_grad_reduce=False for this module, or "
                "recompute with use_reentrant=False"
            )
        type(group).register_grad_ready(group, parameter, *args, **kwargs)

    def _ask(self, place: int, **options: Any) -> None:
        self._asked[place] = options
        self._full.add(place)
        while self._next in self._asked:
            turn = self._next
            self._next = (turn + 1) % len(self._groups)
            group, options = self._groups[turn], self._asked.pop(turn)
            type(group).start_grad_sync(group, **options)
