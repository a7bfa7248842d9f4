# SPDX-License-Identifier: Apache-2.0
"""How far replicas have parted, and what a step would take on a link that loses and retransmits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megatron.core.models.mimo.training.global_names import global_modules, join


def divergence(module: nn.Module, group: Any) -> dict[str, float]:
    """Return how much the copies of each replicated weight differ over a group.

    Losses at the receiver give each rank other activations and gradients, so weights that all TP
    ranks hold alike (norms, biases after a sum) part; losses at the sender keep them equal.

    Args:
        module: bare or wrapped; weights that are sharded over TP are left out.
        group: its TP ranks; all of them call it.

    Returns:
        Name -> the largest absolute difference from the first rank's copy; 0.0 where bits agree.
    """
    found = {}
    for name, owner in global_modules(module):
        for key, weight in owner.named_parameters(recurse=False):
            if not getattr(weight, "tensor_model_parallel", False):
                found[join(name, key)] = _spread(weight.detach(), group)
    return found


def check_same_over_tp(x: torch.Tensor, group: Any, what: str) -> None:
    """Refuse tensors that differ over the TP ranks of one replica: they are to see one batch.

    For a loop of one's own, once, before its first step: a sum over TP of different samples trains
    without an error. It is one collective; the host waits for it.

    Args:
        x: this rank's, of the same shape and dtype on all.
        group: the TP ranks of a replica; all of them call it.
        what: the tensor's name, for the message.

    Raises:
        ValueError: the same on every rank of the group.
    """
    copies = _copies(x, group)
    ranks = dist.get_process_group_ranks(group)
    other = [rank for rank, copy in zip(ranks, copies, strict=True) if not copy.equal(copies[0])]
    if other:
        raise ValueError(
            f"{what} differs over the TP ranks {ranks} of one replica: rank {ranks[0]} has other "
            f"values than {other}; give all TP ranks of a replica the same samples"
        )


@dataclass(frozen=True)
class LinkSpeed:
    """A stated link.

    Args:
        bits_per_second: that a rank can send.
        round_trip_s: until a sender knows what was lost.
        header_bytes: of each packet beside its payload.

    Raises:
        ValueError: no speed, or a negative time or size.
    """

    bits_per_second: float
    round_trip_s: float
    header_bytes: int

    def __post_init__(self) -> None:
        if self.bits_per_second <= 0 or self.round_trip_s < 0 or self.header_bytes < 0:
            raise ValueError(
                "a link has bits_per_second above 0, round_trip_s and header_bytes from 0 on; "
                f"got {self}"
            )


def step_time(rows: Iterable[dict[str, Any]], steps: int, speed: LinkSpeed) -> dict[str, float]:
    """Return what communication adds to a step, computed from counted packets, not measured.

    Messages follow one another and overlap with nothing: an upper bound. A packet that is sent
    again is taken as full as its link's average one. Ranks send at the same time, so the slowest
    one counts; the time of the computation comes on top.

    Args:
        rows: of all ranks, from ``gathered_statistics``.
        steps: how many were counted.
        speed: of the links.

    Returns:
        Seconds per step of the slowest rank: ``send_s``, ``resend_s`` and ``wait_s`` (for the round
        trips before packets are sent again), ``total_s``; and that rank, ``rank``.

    Raises:
        ValueError: no steps, or no rows.
    """
    if steps < 1:
        raise ValueError(f"steps must be 1 or more, got {steps}")
    ranks: dict[int, dict[str, float]] = {}
    for row in rows:
        times = ranks.setdefault(row["rank"], dict.fromkeys(("send_s", "resend_s", "wait_s"), 0.0))
        sent = row["payload_bytes"] + row["packets"] * speed.header_bytes
        send = 8 * sent / speed.bits_per_second / steps
        times["send_s"] += send
        times["resend_s"] += send * row["resent"] / row["packets"] if row["packets"] else 0.0
        times["wait_s"] += row["rounds"] * speed.round_trip_s / steps
    if not ranks:
        raise ValueError("no rows: no place of these links sends; see the rules of the spec")
    totals = {rank: sum(times.values()) for rank, times in ranks.items()}
    slowest = max(totals, key=lambda rank: totals[rank])
    return {"rank": slowest, **ranks[slowest], "total_s": totals[slowest]}


def _spread(x: torch.Tensor, group: Any) -> float:
    copies = _copies(x, group)
    return float((copies - copies[0]).abs().max()) if copies.numel() else 0.0


def _copies(x: torch.Tensor, group: Any) -> torch.Tensor:
    """All ranks' copies, ``(n, …)``."""
    own = x.detach().contiguous().unsqueeze(0)
    whole = own.new_empty((dist.get_world_size(group), *x.shape))
    dist.all_gather_into_tensor(whole, own, group=group)
    return whole
