# SPDX-License-Identifier: Apache-2.0
"""Reads the traces that ``--profile`` writes."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import NamedTuple

from mimo_colocated.train.tracing import TRACK

ROUNDING = 0.002
"""Microseconds: times are written with three digits behind the point."""
CLOCKS = 50.0
"""Microseconds that PyTorch's times, converted from a counter, may be off ours: 6 were seen."""


class Span(NamedTuple):
    """Something that lasts, in microseconds."""

    name: str
    start: float
    stop: float

    def holds(self, other: Span, within: float = ROUNDING) -> bool:
        return self.start - within <= other.start and other.stop <= self.stop + within

    def meets(self, other: Span) -> bool:
        return self.start + ROUNDING < other.stop and other.start + ROUNDING < self.stop


class Spans(NamedTuple):
    """What a trace has: phases on their track, operators of PyTorch."""

    phases: list[Span]
    operators: list[Span]


def read_trace(path: Path) -> tuple[list[Span], Spans]:
    """Return the steps and all else, in order of time."""
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    (track,) = (
        (event["pid"], event["tid"])
        for event in events
        if event["name"] == "thread_name" and event["args"]["name"] == TRACK
    )
    spans = sorted(
        (Span(e["name"], e["ts"], e["ts"] + e["dur"]), (e["pid"], e["tid"]), e["cat"])
        for e in events
        if e["ph"] == "X"
    )
    own = [span for span, at, _ in spans if at == track]
    steps = [span for span in own if span.name.startswith("step ")]
    operators = [span for span, _, kind in spans if kind == "cpu_op"]
    own = [span for span in own if span not in steps]
    return (
        sorted(steps, key=lambda span: span.start),
        Spans(sorted(own, key=lambda span: span.start), operators),
    )


def phases_of(step: Span, spans: Spans) -> list[Span]:
    """Return the phases of a step, one after another, each within the step.

    Every forward operator lies in one phase, as far as PyTorch's clock and ours agree. Those of
    the backward pass may lie across, where a hook begins the next phase within a function.
    """
    found = [span for span in spans.phases if span.meets(step)]
    for span in found:
        assert step.holds(span), (step, span)
    for one, other in zip(found, found[1:], strict=False):
        assert not one.meets(other), (one, other)
    for operator in spans.operators:
        met = [span for span in found if span.meets(operator)]
        if operator.name.startswith("aten::") and met:
            assert any(span.holds(operator, CLOCKS) for span in met), (operator, met)
    return found
