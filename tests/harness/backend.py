# SPDX-License-Identifier: Apache-2.0
"""The one place that decides which backend and device multi-rank tests use."""

from __future__ import annotations

import torch


def choose(world_size: int) -> tuple[str, str]:
    """Return ``(backend, device type)`` for a test world of ``world_size`` ranks.

    NCCL wants one rank per GPU, so it is chosen only when there are enough of them.
    """
    if torch.cuda.is_available() and torch.cuda.device_count() >= world_size:
        return "nccl", "cuda"
    return "gloo", "cpu"


def device_for(local_rank: int, world_size: int) -> torch.device:
    """Return this rank's device; on CUDA it is also made the current one."""
    _, kind = choose(world_size)
    if kind == "cpu":
        return torch.device(kind)
    device = torch.device(kind, local_rank)
    torch.cuda.set_device(device)
    return device
