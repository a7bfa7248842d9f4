# SPDX-License-Identifier: Apache-2.0
"""Train a vision-language model to read handwritten digits, each module on its own layout.

    python examples/mimo/digits/train.py --vision tp=2,dp=4 --language tp=2,cp=2,dp=2

starts one process per rank on this machine (NCCL with enough GPUs, else gloo on the CPU), or runs
as one rank under torchrun. ``--help`` lists all options.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

# Light imports only: the launcher checks options and packages before torch is loaded.
from examples.mimo.digits import PACKAGES
from examples.mimo.digits.options import Options, parse_options
from mimo_colocated.launch import Job, hush, run

if TYPE_CHECKING:
    from mimo_colocated.stop_requests import StopRequests


def plan(options: Options, backend: str) -> bool:
    """``--memory-plan``: print it; whether that was asked for."""
    if options.memory_plan:
        hush()
        from examples.mimo.digits.memory_plan import print_memory_plan

        print_memory_plan(options, accelerated=backend == "nccl")
    return options.memory_plan


def prepare() -> None:
    """Import what every rank needs."""
    hush()
    import sklearn.datasets  # noqa: F401 takes longer than a small job trains

    import examples.mimo.digits.job  # noqa: F401


def work(options: Options, backend: str, requests: StopRequests) -> None:
    """What one rank does."""
    if options.memory_plan:  # under torchrun
        if os.environ["RANK"] == "0":
            plan(options, backend)
        return
    prepare()
    from examples.mimo.digits.job import run_job

    run_job(options, backend, requests)


JOB = Job(__file__, parse_options, work, plan, stops=True, packages=PACKAGES, prepare=prepare)

if __name__ == "__main__":
    sys.exit(run(JOB, sys.argv[1:]))
