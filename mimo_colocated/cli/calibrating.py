# SPDX-License-Identifier: Apache-2.0
"""``mimo calibrate``: measure what the planner needs to know of this machine."""

from __future__ import annotations

from mimo_colocated.cli.models import say, torch_dtype
from mimo_colocated.cli.options import CommandOptions
from mimo_colocated.launch.errors import JobError, write_atomically


def check_first(options: CommandOptions) -> None:
    """Refuse sizes that cannot be measured.

    Raises:
        JobError: heads that do not divide the width.
    """
    more = options.more
    for name in ("width", "encoder_width"):
        if more[name] % more["heads"]:
            option = f"--{name.replace('_', '-')} {more[name]}"
            raise JobError(f"--heads {more['heads']} must divide {option}; take a divisor")
    if options.target.is_dir():
        raise JobError(f"{options.target} is a folder; give the name of a file")


def work(options: CommandOptions) -> None:
    """Measure on this rank; rank 0 writes the file."""
    import os

    import torch
    import torch.distributed as dist

    from megatron.core.models.mimo.job.calibration import Probe, calibrate, ranks_of_node
    from megatron.core.models.mimo.plan.machine import to_json

    more = options.more
    on_gpu = dist.get_backend() == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    usual = torch.bfloat16 if on_gpu else torch.float32
    probe = Probe(
        device,
        torch_dtype(options.dtype) if options.dtype else usual,
        **more,
        ranks_of_node=ranks_of_node(),
    )
    name = torch.cuda.get_device_name(device) if on_gpu else f"cpu of {os.cpu_count()} cores"
    machine = calibrate(probe, name)
    if dist.get_rank() == 0:
        write_atomically(options.target, to_json(machine).encode(), "the machine")
    say(
        f"{machine.name}: products {machine.matmul / 1e9:.1f}, of encoders "
        f"{machine.encoder / 1e9:.1f}, attention {machine.attention / 1e9:.1f} GFLOP/s; "
        f"{machine.inside / 1e9:.2f} GB/s inside a node, {machine.between / 1e9:.2f} between, "
        f"{100 * machine.hidden:.0f} % of it beside products; a layer starts in "
        f"{1e6 * machine.layer_start:.0f} us; "
        f"plan with --gpu {options.target}"
    )
