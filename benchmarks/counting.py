# SPDX-License-Identifier: Apache-2.0
"""Bytes at the collective calls: what comes to this rank over the wire, payload and control apart.

Payload is floating point (rows and gradients); whatever else is exchanged (digests, row counts)
is control. Volumes are those of ring algorithms, as in ``formulas``; an all-to-all moves exactly
what its splits say, less the rank's part to itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist


@dataclass
class Traffic:
    """Bytes at one rank.

    Attributes:
        received, sent: payload.
        control: what else was received.
        calls: collectives with payload.
        control_calls: the others.
    """

    received: float = 0
    sent: float = 0
    control: float = 0
    calls: int = 0
    control_calls: int = 0

    def add(self, tensor: torch.Tensor, received: float, sent: float) -> None:
        """Count one call."""
        if tensor.is_floating_point():
            self.received, self.sent, self.calls = (
                self.received + received, self.sent + sent, self.calls + 1
            )  # fmt: skip
        else:
            self.control, self.control_calls = self.control + received, self.control_calls + 1


def _all_gather(traffic: Traffic, into: torch.Tensor, block: torch.Tensor, group: Any) -> None:
    moved = (dist.get_world_size(group) - 1) * block.nbytes
    traffic.add(block, moved, moved)


def _all_reduce(traffic: Traffic, tensor: torch.Tensor, group: Any) -> None:
    ranks = dist.get_world_size(group)
    moved = 2 * tensor.nbytes * (ranks - 1) / ranks
    traffic.add(tensor, moved, moved)


def _all_to_all(
    traffic: Traffic,
    into: torch.Tensor,
    rows: torch.Tensor,
    group: Any,
    output_split_sizes: list[int],
    input_split_sizes: list[int],
) -> None:
    me, row = dist.get_rank(group), rows[:1].nbytes or into[:1].nbytes
    traffic.add(
        rows,
        (sum(output_split_sizes) - output_split_sizes[me]) * row,
        (sum(input_split_sizes) - input_split_sizes[me]) * row,
    )


_RULES: dict[str, Callable[..., None]] = {
    "all_gather_into_tensor": _all_gather,
    "all_reduce": _all_reduce,
    "all_to_all_single": _all_to_all,
}
_OTHERS = (
    "all_gather",
    "all_gather_object",
    "all_to_all",
    "batch_isend_irecv",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "irecv",
    "isend",
    "recv",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "scatter",
    "send",
)


@contextlib.contextmanager
def counted() -> Iterator[Traffic]:
    """Count the collectives of this process while the context is open.

    Raises:
        AssertionError: in the context, for a collective without a rule: it must not go uncounted.
    """
    traffic = Traffic()
    with contextlib.ExitStack() as stack:
        for name, rule in _RULES.items():
            stack.enter_context(mock.patch.object(dist, name, _counting(name, rule, traffic)))
        for name in _OTHERS:
            stack.enter_context(mock.patch.object(dist, name, _refusing(name)))
        yield traffic


def _counting(name: str, rule: Callable[..., None], traffic: Traffic) -> Callable[..., Any]:
    original = getattr(dist, name)

    def call(*tensors: torch.Tensor, async_op: bool = False, **rest: Any) -> Any:
        rule(traffic, *tensors, **rest)
        return original(*tensors, async_op=async_op, **rest)

    return call


def _refusing(name: str) -> Callable[..., Any]:
    def call(*_args: Any, **_kwargs: Any) -> Any:
        raise AssertionError(f"torch.distributed.{name} has no rule in benchmarks/counting.py")

    return call
