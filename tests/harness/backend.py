# SPDX-License-Identifier: Apache-2.0
"""The one place that decides which backend and device multi-rank tests use."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from tests.harness.gpus import SHARED


def choose(world_size: int) -> tuple[str, str]:
    """Return ``(backend, device type)`` for a test world of ``world_size`` ranks.

    NCCL wants one rank per GPU, so it is chosen only when there are enough of them. Gloo moves
    tensors of GPUs as well, through the host, where ranks are told to share them.
    """
    if not torch.cuda.is_available():
        return "gloo", "cpu"
    if torch.cuda.device_count() >= world_size:
        return "nccl", "cuda"
    return "gloo", "cuda" if os.environ.get(SHARED) else "cpu"


def device_for(local_rank: int, world_size: int) -> torch.device:
    """Return this rank's device; on CUDA it is also made the current one."""
    _, kind = choose(world_size)
    if kind == "cpu":
        return torch.device(kind)
    device = torch.device(kind, local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def own_device() -> torch.device:
    """The device of this rank, or of this process: its tensors and stock's modules lie there."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def share_gloo_device() -> None:
    """Let all gloo groups that this process makes from now on use one device, as do those of forks.

    Else each group has one of its own, whose thread wakes up a hundred times a second as long as
    anything refers to the group. Test processes make groups by the hundred: with 160 of them on
    8 ranks and 2 cores an all-reduce takes four times as long. A job of 8 ranks with the thirty
    groups of two modules spends a tenth of its time on that.
    """
    own = distributed_c10d.ProcessGroupGloo
    if getattr(own, "shares_device", False):
        return
    # By process: a fork lacks the thread of the device that it was forked with.
    devices: dict[int, list] = {}

    class SharedDeviceGloo(own):
        shares_device = True

        def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
            if os.getpid() not in devices:
                # The interface that a launcher chose is read here; else it is gloo's own choice.
                devices[os.getpid()] = [own.create_default_device()]
            options = own._Options()
            options._devices, options._timeout = devices[os.getpid()], timeout
            super().__init__(store, rank, size, options)

    distributed_c10d.ProcessGroupGloo = SharedDeviceGloo
