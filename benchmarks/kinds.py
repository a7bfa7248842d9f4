# SPDX-License-Identifier: Apache-2.0
"""What is measured: one entry per kind. No torch until a kind is asked for."""

from __future__ import annotations

import importlib
import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType


@dataclass(frozen=True)
class Kind:
    """One kind of measurement.

    Attributes:
        name: on the command line, and of its file under the results.
        title: of its table.
        module: where ``COLUMNS`` and ``measure`` (on all ranks) or ``run`` (here) are.
        on_ranks: measured in the launch; else in one process of its own.
    """

    name: str
    title: str
    module: str
    on_ranks: bool = True

    def load(self) -> ModuleType:
        """Import its module."""
        return importlib.import_module(f"benchmarks.{self.module}")


def stock_bridge() -> Path | None:
    """Return the file of the installed Megatron-Core's own bridge; ``None`` where it has none."""
    core = importlib.metadata.distribution("megatron-core").locate_file("megatron/core")
    path = Path(str(core)) / "models" / "mimo" / "comm" / "colocated_communicator.py"
    return path if path.is_file() else None


KINDS = (
    Kind("bytes", "Bytes that come to a rank", "bytes_moved"),
    Kind("memory", "Peak memory, encoder rows to cut sequence and back", "memory"),
    Kind("stages", "Encoder activations of a step with pipeline stages", "stages"),
    Kind("memory-policies", "Encoder activations kept, recomputed, offloaded", "memory_policies"),
    Kind("overlap", "What the asynchronous exchange hides", "overlap"),
    Kind("ahead", "What encoding ahead hides", "ahead"),
    Kind("gathers", "What overlapping reductions and parameter gathers hide", "gathers"),
    Kind("attention", "Attention over CP that keeps its own keys and values", "attention"),
    Kind("step", "Whole step of the digits job", "whole_step"),
    Kind("torch-native", "Torch-native modules beside Megatron's layers", "torch_native"),
    Kind("wall", "Wall time, forward + backward, routed over gather", "wall_time"),
    *(
        (Kind("stock", "The gather bridge beside stock's, without CP", "stock_bridge"),)
        if stock_bridge()
        else ()
    ),
    Kind("plan", "Steps as planned and as measured", "plan_pairs"),
    Kind("plan-memory", "Peaks as planned and as counted", "plan_memory", on_ranks=False),
    Kind("scale", "Planning and set-up for thousands of ranks", "scale", on_ranks=False),
    Kind("data-index", "Opening a million samples", "data_index", on_ranks=False),
    Kind("data-steps", "Planning a global batch of many replicas", "data_steps", on_ranks=False),
)
NAMED = {kind.name: kind for kind in KINDS}
