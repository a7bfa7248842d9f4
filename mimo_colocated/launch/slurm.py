# SPDX-License-Identifier: Apache-2.0
"""Tasks that srun started as ranks: what torchrun would have set, from Slurm's variables.

>>> first_host("gpu[003-010,12],login1"), first_host("a1,b2"), first_host("n-[7]-ib")
('gpu003', 'a1', 'n-7-ib')
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from mimo_colocated.launch.errors import JobError

_PORTS = range(20_000, 30_000)  # below those that Linux gives out by itself
_NEEDED = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NODELIST", "SLURM_JOB_ID")


def rank_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what a rank finds its peers by; nothing where no step of several tasks runs.

    A batch script and a step of one task start their ranks themselves.

    Args:
        environment: of the process.

    Raises:
        JobError: a variable of the step is missing or no number.
    """
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" in environment or tasks == "1":
        return {}
    missing = [name for name in _NEEDED if not environment.get(name)]
    if missing:
        raise JobError(
            f"srun started {tasks} tasks, and {missing[0]} is not set; start ranks with torchrun, "
            "or unset SLURM_STEP_NUM_TASKS to start them here"
        )
    counts = environment.get("SLURM_STEP_TASKS_PER_NODE", tasks)
    node = environment.get("SLURM_NODEID", "0")
    for name, value in (("STEP_NUM_TASKS", tasks), ("PROCID", environment["SLURM_PROCID"]),
                        ("JOB_ID", environment["SLURM_JOB_ID"]), ("NODEID", node)):  # fmt: skip
        if not value.isdecimal():
            raise JobError(f"SLURM_{name}={value!r} is no number; start ranks with torchrun")
    step = int(environment.get("SLURM_STEP_ID", "0"))
    # Steps of a job that run at once do not meet.
    port = _PORTS[(int(environment["SLURM_JOB_ID"]) * 31 + step) % len(_PORTS)]
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(tasks_of_node(counts, int(node))),
        "MASTER_ADDR": environment.get("MASTER_ADDR") or first_host(
            environment["SLURM_STEP_NODELIST"]
        ),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(port),
    }


def first_host(nodes: str) -> str:
    """Return the first host of a list such as ``gpu[003-010,12],login1``."""
    first = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first)


def tasks_of_node(counts: str, node: int) -> int:
    """Return the tasks of a node.

    >>> [tasks_of_node("8(x3),2", node) for node in range(4)]
    [8, 8, 8, 2]

    Args:
        counts: tasks per node, as Slurm writes them.
        node: its number.
    """
    found: list[int] = []
    for part in counts.split(","):
        number, _, times = part.partition("(x")
        found += [int(number)] * int(times.rstrip(")") or 1)
    return found[min(node, len(found) - 1)]


def become_rank() -> None:
    """Set in this process what a rank finds its peers by, if srun started it as one.

    Raises:
        JobError: as :func:`rank_variables`.
    """
    os.environ |= rank_variables(os.environ)
