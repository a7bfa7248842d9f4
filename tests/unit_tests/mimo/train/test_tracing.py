# SPDX-License-Identifier: Apache-2.0
"""Traces of steps: which steps, on which ranks, and what a viewer finds in them."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mimo_colocated import phases
from mimo_colocated.launch.errors import JobError
from mimo_colocated.train.profile_steps import Profile
from mimo_colocated.train.tracing import TRACK, Tracer, on_own_track
from tests.unit_tests.mimo.train.traces import phases_of, read_trace

pytestmark = pytest.mark.once


@pytest.fixture(autouse=True)
def _own_place(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(phases, "_own", phases._Own())
    yield
    assert phases._observers == []


def train_a_step(layer: torch.nn.Module) -> None:
    phases.mark(phases.ENCODER_FORWARD)
    rows = phases.when_gradient_arrives(layer(torch.ones(4, 8)), phases.ENCODER_BACKWARD)
    phases.mark(phases.LANGUAGE_FORWARD)
    output = phases.when_gradient_arrives(layer(rows), phases.LANGUAGE_BACKWARD)
    output.sum().backward()
    phases.mark(phases.OPTIMIZER)
    torch.optim.SGD(layer.parameters(), 0.1).step()
    phases.mark(phases.BETWEEN)


def test_phases_nest_in_steps_and_operations_in_phases(tmp_path: Path) -> None:
    layer = torch.nn.Linear(8, 8)
    tracer = Tracer(Profile(2, 3, (4,)), tmp_path, 4)
    for number in range(1, 5):
        with tracer.step(number):
            train_a_step(layer)
        if tracer.ends_with(number):
            tracer.write()
    assert [path.name for path in (tmp_path / "profile").iterdir()] == [
        "steps_2-3.rank_4.json.gz"
    ]
    steps, spans = read_trace(tracer.path)
    assert [step.name for step in steps] == ["step 2", "step 3"]
    for step in steps:
        assert [span.name for span in phases_of(step, spans)] == [
            phases.BETWEEN,  # until the step's first mark
            phases.ENCODER_FORWARD,
            phases.LANGUAGE_FORWARD,
            phases.LANGUAGE_BACKWARD,
            phases.ENCODER_BACKWARD,
            phases.OPTIMIZER,
            phases.BETWEEN,
        ]


def event(name: str, start: float, stop: float, thread: int, kind: str = "user_annotation") -> Any:
    return {"name": name, "cat": kind, "ph": "X", "pid": 9, "tid": thread, "ts": start,
            "dur": stop - start}  # fmt: skip


def test_a_phase_ends_where_the_next_begins_whatever_the_thread() -> None:
    """On a GPU autograd runs in a thread of its own, whose last phase is closed late."""
    operation = event("aten::mm", 1, 2, 5, "cpu_op")
    kernel = event(phases.ENCODER_FORWARD, 1, 3, 7, "gpu_user_annotation")
    own = event("mine", 4, 5, 5)
    trace = {
        "traceEvents": [
            operation,
            kernel,
            own,
            event("step 1", 0, 10, 5),
            event("step 2", 10, 20, 5),
            event(phases.LANGUAGE_FORWARD, 0, 6, 5),  # the main thread waits for autograd
            event(phases.ENCODER_BACKWARD, 4, 13, 6),
            event(phases.LANGUAGE_BACKWARD, 3, 4, 6),
            event(phases.FINALIZE, 6, 10, 5),
            event(phases.ENCODER_BACKWARD, 12, 30, 6),
        ]
    }
    before = [dict(each) for each in (operation, kernel, own)]
    on_own_track(trace)
    assert trace["traceEvents"][:3] == before
    moved = [each for each in trace["traceEvents"][3:] if each["ph"] == "X"]
    assert {each["tid"] for each in moved} == {8}
    times = sorted((each["ts"], each["ts"] + each["dur"], each["name"]) for each in moved)
    assert times == [
        (0, 3, phases.LANGUAGE_FORWARD),
        (0, 10, "step 1"),
        (3, 4, phases.LANGUAGE_BACKWARD),
        (4, 6, phases.ENCODER_BACKWARD),
        (6, 10, phases.FINALIZE),
        (10, 20, "step 2"),
        (12, 20, phases.ENCODER_BACKWARD),
    ]
    about = {each["name"]: each["args"] for each in trace["traceEvents"] if each["ph"] == "M"}
    assert about["thread_name"] == {"name": TRACK}
    nothing: dict[str, Any] = {"traceEvents": [operation]}
    on_own_track(nothing)
    assert nothing == {"traceEvents": [operation]}


def test_each_thread_closes_its_own_phase(tmp_path: Path) -> None:
    tracer = Tracer(Profile(1, 1, None), tmp_path, 0)
    with tracer.step(1):
        other = threading.Thread(target=phases.mark, args=[phases.ENCODER_BACKWARD])
        other.start()
        other.join()
        assert len(tracer._open) == 2
        phases.mark(phases.FINALIZE)
        assert len(tracer._open) == 2
    assert tracer._open == {}
    tracer.write()
    assert [step.name for step in read_trace(tracer.path)[0]] == ["step 1"]


def test_a_run_that_ends_early_leaves_what_was_recorded(tmp_path: Path) -> None:
    tracer = Tracer(Profile(1, 5, None), tmp_path, 0)

    def lose() -> None:
        with tracer.step(1):
            phases.mark(phases.LANGUAGE_FORWARD)
            raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        lose()
    tracer.write()
    steps, spans = read_trace(tracer.path)
    assert [each.name for each in phases_of(steps[0], spans)][-1] == phases.LANGUAGE_FORWARD
    content = tracer.path.read_bytes()
    tracer.write()  # nothing more
    assert tracer.path.read_bytes() == content
    idle = Tracer(Profile(1, 5, (1,)), tmp_path / "other", 0)
    with idle.step(1):
        assert phases._observers == []
    idle.write()
    assert list(tmp_path.glob("other/**")) == []


@pytest.mark.parametrize(
    ("steps", "ranks", "said"),
    [
        ("12-10", "0", r"--profile 12-10: give a step or a range of steps, counted from 1"),
        ("0", "0", "--profile 0: give a step"),
        ("ten", "0", "--profile ten: give a step"),
        ("10", "0,x", "--profile-ranks 0,x: give ranks, such as 0,3, or all"),
        ("9-11", "0", r"--profile 9-11: the run has training\.steps=10; give steps up to that"),
        ("9", "3,8", "--profile-ranks names rank 8, and the run has 8: 0 to 7"),
        ("4-9", "0", "--profile 4-9: the run goes on after step 5; give steps from 6 on"),
    ],
)
def test_steps_and_ranks_that_a_run_does_not_have(steps: str, ranks: str, said: str) -> None:
    def ask() -> None:
        wanted = Profile.parse(steps, ranks)
        wanted.check(10, 8)
        wanted.check_ahead(5)

    with pytest.raises(JobError, match=said):
        ask()


def test_what_was_typed_can_be_typed_again() -> None:
    for given in (("3", "all"), ("3-7", "5,2")):
        wanted = Profile.parse(*given)
        words = wanted.typed.split()
        assert Profile.parse(words[1], words[3]) == wanted
    assert not wanted.includes(0)
    assert wanted.includes(2)


def test_a_trace_that_does_not_nest_is_noticed(tmp_path: Path) -> None:
    """The control of the oracle: phases as PyTorch leaves them, beside autograd's functions."""
    step = event("step 1", 0, 1000, 5)
    track = {"ph": "M", "name": "thread_name", "pid": 9, "tid": 5, "args": {"name": TRACK}}
    for wrong in (
        [event(phases.FINALIZE, 100, 400, 5), event(phases.OPTIMIZER, 300, 500, 5)],
        [event(phases.FINALIZE, 100, 1100, 5)],
        [event("aten::mm", 300, 500, 6, "cpu_op"), event(phases.FINALIZE, 100, 400, 5)],
    ):
        path = tmp_path / "trace.json.gz"
        path.write_bytes(gzip.compress(json.dumps({"traceEvents": [step, track, *wrong]}).encode()))
        steps, spans = read_trace(path)
        with pytest.raises(AssertionError):
            phases_of(steps[0], spans)
