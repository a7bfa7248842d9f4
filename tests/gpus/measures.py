# SPDX-License-Identifier: Apache-2.0
"""Figures that a device alone tells; each a program that prints a line of JSON.

``python -m tests.gpus.measures offload`` or ``varlen`` on one GPU; ``groups`` under torchrun, a
rank per GPU.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from benchmarks.memory import peak_bytes
from megatron.core.models.mimo.memory.offload import HostUse, OffloadedPart
from megatron.core.models.mimo.training.groups import create_process_groups, make_grid
from megatron.core.models.mimo.transformer import context_parallel_attention as cpa
from megatron.core.transformer.enums import AttnMaskType
from tests.harness.backend import own_device
from tests.unit_tests.mimo.attention_oracle import (
    Case,
    FakeGroup,
    fake_groups,
    reference,
    tiny_config,
)

FIGURES = "figures: "
_LAYERS, _ROWS, _WIDTH = 8, 16384, 1024
# Of the peak of 8 layers that are kept: what one layer and the copies under way leave.
OFFLOADED = 0.5
# Padding within a chunk, chunks and a sequence of padding alone, one token.
_PACKED = (1000, 37, 1, 513, 0), (1024, 64, 8, 640, 64)
# Of the error that PyTorch's ordinary attention makes in the same dtype; a kernel that aligns its
# causal mask to the first key is a hundred times as far off.
_ERRORS = 2.0


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


def varlen(
    lengths: tuple[tuple[int, ...], ...] = _PACKED, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Any]:
    """Return calls per layer of packed attention over PyTorch's kernel, and how far off it is.

    CP 1 and the ranks of CP 2, one after the other; causal and not. Errors are of outputs and
    gradients, over the largest number, against fp64.

    Args:
        lengths: real and padded ones of the sequences.
        dtype: of the tensors.
    """
    calls, once, each = set[int](), 0.0, 0.0
    for causal in (True, False):
        heads = {"heads": 8, "groups": 2, "head_dim": 64, "value_dim": 64}
        case = Case(*lengths, causal=causal, packed=True, **heads)
        inputs = [x.detach().to(own_device(), dtype) for x in case.tensors()]
        exact = _exact(case, inputs)
        for cp in (1, 2):
            made: list[int] = []
            with mock.patch.object(cpa, "attend_segments", _counting(made)):
                once = max(once, _error(_packed(case, inputs, cp), exact))
            calls.add(len(made) // cp)
            with mock.patch.object(cpa, "varlen_kernel", return_value=None):
                each = max(each, _error(_packed(case, inputs, cp), exact))
    return {
        "calls": max(calls),
        "error": float(f"{once:.2g}"),
        "error of a call per sequence": float(f"{each:.2g}"),
        "passed": calls == {1} and once <= _ERRORS * each + torch.finfo(dtype).eps,
    }


def _counting(made: list[int]) -> Callable[..., Any]:
    attend = cpa.attend_segments

    def call(*args: Any) -> Any:
        made.append(1)
        return attend(*args)

    return call


def _packed(case: Case, inputs: list[torch.Tensor], cp: int) -> list[torch.Tensor]:
    """Outputs and gradients over all ranks, as positions go."""
    *leaves, grad = (x.detach().requires_grad_() for x in inputs)
    q, k, v = leaves
    places = [case.positions(rank, cp).to(q.device) for rank in range(cp)]
    gathered = torch.cat([torch.cat([k, v], dim=-1)[place] for place in places])
    mask_type = AttnMaskType.causal if case.causal else AttnMaskType.no_mask
    config, params = tiny_config(context_parallel_size=cp), case.packed_params()
    with mock.patch.object(cpa._GatherSequence, "apply", return_value=gathered):
        out = []
        for rank, place in enumerate(places):
            groups = fake_groups(cp=FakeGroup(rank, cp))
            layer = cpa.ContextParallelAttention(
                config, 1, mask_type, "self", pg_collection=groups
            )
            local = (x[place].squeeze(1) for x in leaves)
            out.append(layer(*local, None, packed_seq_params=params))
        order = torch.cat(places).argsort()
        whole = torch.cat(out)[order]
        return [whole, *torch.autograd.grad(whole, leaves, grad.detach().squeeze(1).flatten(-2))]


def _exact(case: Case, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    *leaves, grad = (x.detach().double().requires_grad_() for x in inputs)
    out = reference(*leaves, case.allowed().to(grad.device), None).squeeze(1)
    return [out, *torch.autograd.grad(out, leaves, grad.detach().squeeze(1).flatten(-2))]


def _error(found: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    pairs = zip(found, exact, strict=True)
    return max(float((x - wanted).abs().max() / wanted.abs().max()) for x, wanted in pairs)


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
    if name in ("offload", "varlen"):
        found = {"offload": offload, "varlen": varlen}[name]()
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
