# SPDX-License-Identifier: Apache-2.0
"""Train a vision-language model to read handwritten digits, each module on its own layout.

    python examples/mimo/digits/train.py --vision tp=2,dp=4 --language tp=2,cp=2,dp=2

starts one process per rank on this machine (NCCL with enough GPUs, else gloo on the CPU), or runs
as one rank under torchrun. ``--help`` lists all options.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

# Light imports only: the launcher checks options and packages before torch is loaded.
sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from needs import PACKAGES
from options import Options, parse_options

from mimo_colocated.launch import Job, run

if TYPE_CHECKING:
    from mimo_colocated.stop_requests import StopRequests


def parse(argv: Sequence[str], world_size: int | None) -> Options:
    """Options from the command line; ``world_size`` is None before ranks are started."""
    return parse_options(argv, world_size=world_size)


def plan(options: Options, backend: str) -> bool:
    """``--memory-plan``: print it; whether that was asked for."""
    if options.memory_plan:
        _hush()
        from memory_plan import print_memory_plan

        print_memory_plan(options, accelerated=backend == "nccl")
    return options.memory_plan


def work(options: Options, backend: str, requests: StopRequests) -> None:
    """What one rank does."""
    if options.memory_plan:  # under torchrun
        if os.environ["RANK"] == "0":
            plan(options, backend)
        return
    prepare()
    from job import run_job

    run_job(options, backend, requests)


def prepare() -> None:
    """Import what every rank needs."""
    _hush()
    import job  # noqa: F401
    import sklearn.datasets  # noqa: F401 takes longer than a small run trains


def _hush() -> None:
    # Megatron-Core warns of optional packages, once per rank; none is needed here.
    warnings.simplefilter("ignore")
    # Nor are the libraries' notes to their developers; what a user has to know comes as an error.
    for name in ("megatron", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)


JOB = Job(__file__, parse, work, plan, stops=True, packages=PACKAGES, prepare=prepare)

if __name__ == "__main__":
    sys.exit(run(JOB, sys.argv[1:]))
