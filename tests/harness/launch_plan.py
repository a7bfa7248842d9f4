# SPDX-License-Identifier: Apache-2.0
"""What a launch of ranks is to do, as a plan in its folder, for the digits job's launcher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class LaunchOptions:
    """What the launcher asks for (ranks, backend, folder for results), and the plan."""

    world_size: int
    backend: str
    out: Path
    plan: Any


def plan_reader(plan_class: Any) -> Callable[[Sequence[str], int | None], LaunchOptions]:
    """Parser of a command line that names the folder in which ``plan.json`` lies.

    Args:
        plan_class: has ``read(path)``, ``world_size`` and ``backend``.
    """

    def parse(argv: Sequence[str], _world_size: int | None) -> LaunchOptions:
        (folder,) = argv
        plan = plan_class.read(Path(folder) / "plan.json")
        return LaunchOptions(plan.world_size, plan.backend, Path(folder), plan)

    return parse
