# SPDX-License-Identifier: Apache-2.0
"""``--profile STEPS``: a trace of some steps by PyTorch's profiler, with the phases named."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from mimo_colocated import phases
from mimo_colocated.launch.errors import write_atomically
from mimo_colocated.train.profile_steps import Profile

FOLDER = "profile"
TRACK = "phases"
"""Name of the thread that the phases are shown as."""
_STEP = re.compile(r"step \d+")


class Tracer:
    """Records steps of this rank, if it is asked to.

    Args:
        wanted: which steps, on which ranks.
        out: folder of the run; the trace is written below it.
        rank: this one.

    Attributes:
        path: of the trace.
    """

    def __init__(self, wanted: Profile, out: Path, rank: int) -> None:
        name = f"steps_{wanted.first}-{wanted.last}.rank_{rank}.json.gz"
        self.path, self._wanted, self._rank = out / FOLDER / name, wanted, rank
        self._profiler: Any = None
        # Thread -> what is open in it: on a GPU autograd has a thread of its own.
        self._open: dict[int, record_function] = {}

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Record what is inside, if it is wanted.

        Args:
            number: of the step, from 1.
        """
        if not (self._wanted.includes(self._rank) and number in self._wanted.steps):
            yield
            return
        if self._profiler is None:
            self._profiler = profile(activities=_activities())
            self._profiler.start()
        with record_function(f"step {number}"):
            self._enter(phases.here().phase)
            phases.observe(self._enter)
            try:
                yield
            finally:
                phases.stop_observing(self._enter)
                self._leave()

    def ends_with(self, number: int) -> bool:
        """Return whether a step is the last that is recorded, the same on every rank."""
        return number == self._wanted.last

    def write(self) -> None:
        """Write what was recorded so far, if anything was, and record no more.

        Raises:
            JobError: it cannot be written.
        """
        if self._profiler is None:
            return
        self._profiler.stop()
        with tempfile.TemporaryDirectory() as place:
            path = Path(place) / "trace.json"
            self._profiler.export_chrome_trace(str(path))
            trace = json.loads(path.read_bytes())
        on_own_track(trace)
        write_atomically(self.path, gzip.compress(json.dumps(trace).encode()), "the trace")
        self._profiler = None

    def _enter(self, phase: str) -> None:
        thread = threading.get_ident()
        before = self._open.pop(thread, None)
        if before is not None:
            before.__exit__(None, None, None)
        self._open[thread] = record_function(phase)
        self._open[thread].__enter__()

    def _leave(self) -> None:
        while self._open:
            self._open.popitem()[1].__exit__(None, None, None)


def on_own_track(trace: dict[str, Any]) -> None:
    """Show steps and phases as a thread of their own, each phase until the next one begins.

    A phase of the backward pass begins within one autograd function and ends within another, so
    beside them it would not nest. What they name on the GPU stays where it is.

    Args:
        trace: as PyTorch writes it; changed.
    """
    events = trace["traceEvents"]
    known = {*phases.PHASES}
    named = [each for each in events if each.get("cat") == "user_annotation"]
    steps = sorted((e for e in named if _STEP.fullmatch(e["name"])), key=_start)
    if not steps:
        return
    inner = sorted((e for e in named if e["name"] in known), key=_start)
    for event, following in zip(inner, inner[1:], strict=False):
        event["dur"] = min(event["dur"], following["ts"] - event["ts"])
    for event in inner:  # one that is left open in another thread
        step = [each for each in steps if each["ts"] <= event["ts"]][-1]
        event["dur"] = min(event["dur"], step["ts"] + step["dur"] - event["ts"])
    process = steps[0]["pid"]
    track = max(each["tid"] for each in events if isinstance(each.get("tid"), int)) + 1
    for event in (*steps, *inner):
        event["tid"] = track
    about = {"thread_name": {"name": TRACK}, "thread_sort_index": {"sort_index": -1}}
    for name, value in about.items():
        events.append({"ph": "M", "name": name, "pid": process, "tid": track, "args": value})


def _start(event: dict[str, Any]) -> float:
    return event["ts"]


def _activities() -> list[ProfilerActivity]:
    on_gpu = [ProfilerActivity.CUDA] * torch.cuda.is_available()
    return [ProfilerActivity.CPU, *on_gpu]
