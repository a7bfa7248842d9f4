# SPDX-License-Identifier: Apache-2.0
"""Two figures that the device's memory alone tells; each a program that prints a line of JSON.

``python -m tests.gpus.measures offload`` on one GPU; ``groups`` under torchrun, a rank per GPU.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.memory import peak_bytes
from megatron.core.models.mimo.memory.offload import HostUse, OffloadedPart
from megatron.core.models.mimo.training.groups import create_process_groups, make_grid
from tests.harness.backend import own_device

FIGURES = "figures: "
_LAYERS, _ROWS, _WIDTH = 8, 16384, 1024
# Of the peak of 8 layers that are kept: what one layer and the copies under way leave.
OFFLOADED = 0.5


def offload(rows: int = _ROWS, smallest: int = 1) -> dict[str, Any]:
    """Return the peak of a forward pass, activations kept and on the host.

    Args:
        rows: of the input.
        smallest: bytes of the smallest storage that is moved.
    """
    device = own_device()
    layer = (torch.nn.Linear(_WIDTH, _WIDTH), torch.nn.GELU(), torch.nn.LayerNorm(_WIDTH))
    model = torch.nn.Sequential(*(torch.nn.Sequential(*layer) for _ in range(_LAYERS))).to(device)
    inputs = torch.randn(rows, _WIDTH, device=device, requires_grad=True)

    def forward(moved: bool) -> int:
        part = OffloadedPart(model.parameters(), smallest if moved else sys.maxsize, HostUse())
        made = []

        def run() -> None:
            with part.hooks():
                made.append(model(inputs))

        peak = peak_bytes(run)
        part.start_reload()
        made[0].sum().backward()
        return peak

    forward(False)  # what is allocated once
    kept, moved = forward(False), forward(True)
    ratio = moved / kept
    return {
        "kept MiB": kept >> 20,
        "offloaded MiB": moved >> 20,
        "ratio": round(ratio, 3),
        "passed": ratio <= OFFLOADED,
    }


def groups(used: Callable[[], int]) -> dict[str, Any]:
    """Return what the device holds before and after the groups of a layout like the README's.

    Args:
        used: bytes of the device that are taken, by whatever.
    """
    size = dist.get_world_size()
    cp = 2 if size % 2 == 0 else 1
    before = used()
    grids = make_grid(dp=size), make_grid(cp=cp, dp=size // cp)
    made = [create_process_groups(grid) for grid in grids]
    connected = used()
    for each in made:
        dist.all_reduce(torch.ones(1, device=own_device()), group=each.dp)
    after = used()
    taken = {"made MiB": connected - before >> 20, "used MiB": after - before >> 20}
    return {"ranks": size, **taken, "passed": None}


def _used() -> int:
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return total - free


def main(name: str) -> int:
    """Measure, print; the exit code is 1 where a bound is not kept."""
    if name == "offload":
        found = offload()
    else:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
        found = groups(_used)
        rank = dist.get_rank()
        dist.destroy_process_group()
        if rank:
            return 0
    print(FIGURES + json.dumps(found))
    return int(found["passed"] is False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
