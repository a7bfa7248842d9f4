# SPDX-License-Identifier: Apache-2.0
"""The checks of ``make gpu-check``: what each runs, and on how many GPUs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tests.harness.gpus import SHARED

_UNIT = "tests/unit_tests/mimo/"
_BRIDGES = (_UNIT + "test_bridge_8rank.py", _UNIT + "test_routed_bridge_8rank.py")


@dataclass(frozen=True)
class Check:
    """One command.

    Attributes:
        shows: what passing it says.
        arguments: of Python.
        gpus: that it needs.
        module: that has to be importable, if any.
        environment: what is set for it.
        per_gpu: run by torchrun, a process on each GPU that is there.
    """

    shows: str
    arguments: tuple[str, ...]
    gpus: int = 1
    module: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    per_gpu: bool = False

    def lacks(self, gpus: int, modules: set[str]) -> str:
        """Return what this machine lacks for it; nothing if it can run.

        Args:
            gpus: that are there.
            modules: of those that checks ask for, what can be imported.
        """
        if gpus < self.gpus:
            return f"needs {self.gpus} GPU{'s' if self.gpus > 1 else ''}, found {gpus}"
        if self.module and self.module not in modules:
            return f"needs {self.module}, which cannot be imported"
        return ""

    def command(self, gpus: int) -> tuple[str, ...]:
        """Return Python's arguments on a machine with so many GPUs."""
        if not self.per_gpu:
            return self.arguments
        torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}")
        return *torchrun, *self.arguments


def _tests(*files: str) -> tuple[str, ...]:
    return "-m", "pytest", "-q", "-p", "no:cacheprovider", *files


CHECKS = {
    "bridges, shared GPU": Check(
        "rows and gradients over gloo, 8 ranks whose tensors lie on the GPUs that are there",
        _tests(*_BRIDGES),
        environment={SHARED: "1"},
    ),
    "offload": Check(
        "the peak of 8 layers whose activations are on the host, below half of those kept",
        ("-m", "tests.gpus.measures", "offload"),
    ),
    "packed attention": Check(
        "packed sequences in one call of PyTorch's `varlen_attn` a layer, in bf16, with the "
        "numbers of a call per sequence; on GPUs of compute capability 8.0 and newer",
        ("-m", "tests.gpus.measures", "varlen"),
    ),
    "Transformer Engine, bf16": Check(
        "logits and gradients of models from folders, over Transformer Engine's kernels",
        ("-m", "tests.imported", "--only", "bf16", "--out", "runs/gpus/models"),
        module="transformer_engine.pytorch",
    ),
    "communicators": Check(
        "device memory of the README's groups once they are made",
        ("-m", "tests.gpus.measures", "groups"),
        gpus=2,
        per_gpu=True,
    ),
    "waits, 2 ranks": Check(
        "no host waits for its device in a microbatch: PyTorch raises where one does",
        _tests(_UNIT + "test_host_waits_ranks.py"),
        gpus=2,
    ),
    "waits, 8 ranks": Check(
        "the same with TP, CP and pipeline stages",
        _tests(_UNIT + "test_host_waits_8rank.py"),
        gpus=8,
    ),
    "bridges": Check("rows and gradients over NCCL", _tests(*_BRIDGES), gpus=8),
    "parity": Check(
        "every gradient of every layout is that of one process, over NCCL",
        ("-m", "tests.parity", "--out", "runs/gpus/parity"),
        gpus=8,
    ),
    "overlap": Check(
        "the exchange runs beside the embedding; the trace is in the folder",
        ("-m", "benchmarks", "--only", "overlap", "--out", "runs/gpus/overlap"),
        gpus=8,
    ),
    "memory": Check(
        "what keeping, recomputing and offloading save, against what is predicted",
        ("-m", "benchmarks", "--only", "memory-policies", "--out", "runs/gpus/memory"),
        gpus=8,
    ),
    "faults": Check(
        "killed and stopped ranks over NCCL are named, with the phase of their device",
        ("-m", "tests.faults", "--cases", "8", "--out", "runs/gpus/faults"),
        gpus=8,
    ),
}
