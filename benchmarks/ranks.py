# SPDX-License-Identifier: Apache-2.0
"""What the ranks of the launch do. Run as ``ranks.py FOLDER``, where the plan lies.

The digits job's launcher starts the ranks, ends them together and says which one failed and why.
"""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

if __name__ == "__main__":
    # The modules of this script's own folder are the package's, not top-level ones.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.cases import Pair
from benchmarks.kinds import NAMED
from tests.harness.launch_plan import LaunchOptions, plan_reader
from tests.parity.records import ProgressWriter

_COLLECTIVE_S = 300


@dataclass(frozen=True)
class Plan:
    """One launch.

    Attributes:
        world_size: its ranks.
        kinds: names, in order.
        layouts: pairs as text; the kinds' own if there are none.
        quick: fewer and smaller cells.
        backend: of the process groups, or ``"auto"``.
        results: folder for what is no table (traces).
    """

    world_size: int
    kinds: tuple[str, ...]
    layouts: tuple[str, ...]
    quick: bool
    backend: str
    results: str

    def write(self, path: Path) -> None:
        """Leave the plan for the ranks."""
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Plan:
        """The plan in a file."""
        values = json.loads(path.read_text())
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def job(options: LaunchOptions, backend: str) -> None:
    """All kinds of the plan, on this rank; a record per cell."""
    warnings.simplefilter("ignore")
    import torch.distributed as dist
    from launch import init_distributed

    init_distributed(backend, _COLLECTIVE_S)
    writer = ProgressWriter(options.out / "progress.jsonl")
    leads, plan = dist.get_rank() == 0, options.plan
    for name in plan.kinds:
        if leads:
            writer.started(name)
        for cell in measured(name, plan):
            if leads:
                writer.finished(name, cell | {"backend": backend})
    dist.barrier()


def measured(name: str, plan: Plan):  # noqa: ANN201
    """Cells of a kind, as they come."""
    pairs = tuple(Pair.parse(text) for text in plan.layouts)
    extra = {"results": Path(plan.results)} if name == "overlap" else {}
    yield from NAMED[name].load().measure(pairs, plan.quick, **extra)


if __name__ == "__main__":
    from launch import run

    sys.exit(run(__file__, sys.argv[1:], plan_reader(Plan), job))
