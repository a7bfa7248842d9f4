# SPDX-License-Identifier: Apache-2.0
"""How long a rank's step is in its encoders, on the bridges, in its language model."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch

from mimo_colocated import phases

PARTS = {
    phases.DATA: "data",
    phases.ENCODER_FORWARD: "encoder",
    phases.ENCODER_BACKWARD: "encoder",
    phases.INPUT_EXCHANGE: "bridge",
    phases.BRIDGE_FORWARD: "bridge",
    phases.BRIDGE_BACKWARD: "bridge",
    phases.LANGUAGE_FORWARD: "language",
    phases.LANGUAGE_BACKWARD: "language",
    phases.FINALIZE: "gradients",
    phases.OPTIMIZER: "optimizer",
}
"""Phase -> part of a step; all else is ``other``."""


class PhaseClock:
    """Adds up the seconds of each part of a step, from mark to mark.

    A mark reads the host's clock, or puts an event into the GPU's stream, which nobody waits for
    until :meth:`read`. What autograd runs behind a mark counts as that phase: the gradient of the
    text's embedding is part of what came before it.

    Args:
        on_gpu: measure on the GPU.
    """

    def __init__(self, *, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self._marks = [(phases.here().phase, self._now())]
        phases.observe(self._enter)

    def read(self) -> dict[str, float]:
        """Return part -> seconds since the last call, and begin anew.

        On a GPU the host waits here until all of it is done, once a step.
        """
        marks, last = self._marks, self._marks[-1][0]
        self._marks = [(last, self._now())]
        if self._on_gpu:
            self._marks[0][1].synchronize()
        found = dict.fromkeys(PARTS.values(), 0.0)
        for (phase, start), (_, stop) in zip(marks, marks[1:] + self._marks, strict=True):
            if phase in PARTS:
                found[PARTS[phase]] += self._between(start, stop)
        return found

    def close(self) -> None:
        """Measure no more."""
        phases.stop_observing(self._enter)

    def _enter(self, phase: str) -> None:
        if phase != self._marks[-1][0]:
            self._marks.append((phase, self._now()))

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start: Any, stop: Any) -> float:
        return start.elapsed_time(stop) / 1e3 if self._on_gpu else stop - start


def with_other(times: Mapping[str, float], seconds: float) -> dict[str, float]:
    """Return the parts of a step and, as ``other``, what is left of its seconds.

    >>> with_other({"encoder": 0.5, "language": 1.0}, 2.0)
    {'encoder': 0.5, 'language': 1.0, 'other': 0.5}
    """
    return {**times, "other": max(seconds - sum(times.values()), 0.0)}


def said_times(times: Mapping[str, float]) -> str:
    """Return the shares of a step, largest first, those below a hundredth left out.

    >>> said_times({"encoder": 0.5, "language": 1.494, "data": 0.006})
    'language 75%, encoder 25%'
    """
    whole = max(sum(times.values()), 1e-9)
    ranked = sorted(times.items(), key=lambda each: -each[1])
    return ", ".join(f"{name} {part / whole:.0%}" for name, part in ranked if part >= whole / 100)
