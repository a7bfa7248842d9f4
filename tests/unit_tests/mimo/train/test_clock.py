# SPDX-License-Identifier: Apache-2.0
"""How a step's seconds are told apart, by the host's clock and by events of a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from mimo_colocated import phases
from mimo_colocated.train import clock
from mimo_colocated.train.clock import PARTS, PhaseClock, with_other

pytestmark = pytest.mark.once


class Ticks:
    """A clock that is set."""

    now, waited = 0.0, 0


class Event:
    """Of a GPU that works as the clock says; in milliseconds."""

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = Ticks.now * 1e3

    def elapsed_time(self, other: Event) -> float:
        return other.at - self.at

    def synchronize(self) -> None:
        Ticks.waited += 1


@pytest.fixture(params=[False, True], ids=["host", "GPU"])
def measured(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[
    PhaseClock
]:
    Ticks.now, Ticks.waited = 0.0, 0
    monkeypatch.setattr(clock.time, "perf_counter", lambda: Ticks.now)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(phases, "_own", phases._Own())
    found = PhaseClock(on_gpu=request.param)
    yield found
    found.close()


def spend(*parts: tuple[str, float]) -> None:
    for phase, seconds in parts:
        phases.mark(phase)
        Ticks.now += seconds


def test_the_parts_of_a_step(measured: PhaseClock) -> None:
    Ticks.now += 100.0  # before anything is marked
    with phases.during(phases.DATA):
        Ticks.now += 0.5
    for _ in range(2):
        spend((phases.ENCODER_FORWARD, 1.0), (phases.BRIDGE_FORWARD, 2.0))
        spend((phases.LANGUAGE_FORWARD, 4.0), (phases.LANGUAGE_FORWARD, 4.0))
        spend((phases.LANGUAGE_BACKWARD, 16.0), (phases.BRIDGE_BACKWARD, 32.0))
        spend((phases.ENCODER_BACKWARD, 64.0))
    assert Ticks.waited == 0  # whatever the number of microbatches
    spend((phases.FINALIZE, 128.0), (phases.OPTIMIZER, 256.0), (phases.BETWEEN, 512.0))
    assert measured.read() == {
        "data": 0.5,
        "encoder": 130.0,
        "bridge": 68.0,
        "language": 48.0,
        "gradients": 128.0,
        "optimizer": 256.0,
    }
    assert Ticks.waited == measured._on_gpu
    # What goes on counts for the step that it is in; a job's own phase is none of the parts.
    spend((phases.ENCODER_FORWARD, 1.0))
    assert measured.read()["encoder"] == 1.0
    Ticks.now += 2.0
    spend((phases.SAVE, 8.0), ("the job's own", 8.0))
    assert measured.read() == {**dict.fromkeys(PARTS.values(), 0.0), "encoder": 2.0}


def test_nothing_is_measured_after_the_end(measured: PhaseClock) -> None:
    measured.close()
    measured.close()
    spend((phases.ENCODER_FORWARD, 1.0))
    assert measured.read()["encoder"] == 0.0
    assert measured._enter not in phases._observers


def test_the_parts_never_are_more_than_nothing_is_left() -> None:
    """On a GPU the end of a step may run into the next one."""
    assert with_other({"language": 2.0}, 1.5) == {"language": 2.0, "other": 0.0}
