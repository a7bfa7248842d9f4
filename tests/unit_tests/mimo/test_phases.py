# SPDX-License-Identifier: Apache-2.0
"""What a rank is doing: marks, and the file that outlives the process. One process, no torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mimo_colocated import phases
from mimo_colocated.phases import Place, Wait, read_places

pytestmark = pytest.mark.once


@pytest.fixture(autouse=True)
def _own_place(monkeypatch):
    monkeypatch.setattr(phases, "_own", phases._Own())


def test_marks_steps_and_microbatches(tmp_path):
    path = phases.record_into(tmp_path, 3)
    assert read_places(tmp_path)[3].phase == phases.START
    phases.at_step(12)
    assert [phases.next_microbatch(), phases.next_microbatch()] == [0, 1]
    phases.mark(phases.ENCODER_FORWARD)
    place = read_places(tmp_path)[3]
    assert (place.rank, place.pid) == (3, os.getpid())
    assert place.words() == "the phase 'encoder forward' of step 12, microbatch 1"
    assert place == phases.here()
    assert path.stat().st_size == phases.SIZE
    phases.end_of_microbatches()
    phases.mark(phases.FINALIZE)
    assert read_places(tmp_path)[3].words() == "the phase 'gradient finalisation' of step 12"
    phases.at_step(0, "evaluation batch")
    assert phases.next_microbatch() == 0
    phases.mark(phases.LANGUAGE_FORWARD, 5)
    assert phases.here().words() == (
        "the phase 'language forward' of evaluation batch 0, microbatch 5"
    )


def test_microbatches_are_counted_anew_in_jobs_that_tell_no_steps():
    for _ in range(2):
        assert [phases.next_microbatch(), phases.next_microbatch()] == [0, 1]
        phases.end_of_microbatches()


def test_without_steps_only_the_phase_is_told():
    phases.next_microbatch()
    phases.mark("my own phase")
    assert phases.here().words() == "the phase 'my own phase'"


def test_the_phase_before_comes_back_but_not_after_an_error():
    phases.mark(phases.LANGUAGE_BACKWARD)
    with phases.during(phases.BRIDGE_BACKWARD):
        assert phases.here().phase == phases.BRIDGE_BACKWARD
    assert phases.here().phase == phases.LANGUAGE_BACKWARD
    with pytest.raises(ValueError, match="full"), phases.during(phases.SAVE):
        raise ValueError("full")
    assert phases.here().phase == phases.SAVE


def test_observers_are_told_of_every_mark_until_they_stop():
    told = []
    phases.observe(told.append)
    with phases.during(phases.DATA):
        phases.mark(phases.ENCODER_FORWARD, 3)
        phases.mark(phases.ENCODER_FORWARD)
    phases.stop_observing(told.append)
    phases.stop_observing(told.append)
    phases.mark(phases.OPTIMIZER)
    assert told == [
        phases.DATA,
        phases.ENCODER_FORWARD,
        phases.ENCODER_FORWARD,
        phases.START,
    ]


def test_a_wait_is_noted_while_it_lasts_and_after_an_error():
    with phases.waiting("receive", [4], "pp"):
        assert phases.here().wait == Wait("receive", (4,), "pp")
    assert phases.here().wait is None
    with pytest.raises(ValueError, match="lost"), phases.waiting("send", [0, 1], "pp"):
        raise ValueError("lost")
    assert phases.here().wait == Wait("send", (0, 1), "pp")


def test_names_and_waits_that_just_fit_and_do_not(tmp_path: Path):
    """A wait has 256 bytes and is told whole or not at all; a phase has 40."""
    phases.record_into(tmp_path, 0)
    just = Wait("send", (0,), "p" * (256 - len('["send", [0], ""]')))
    with phases.waiting("send", [0], just.group):
        assert read_places(tmp_path)[0].wait == just
    with phases.waiting("send", [0], just.group + "p"):
        assert read_places(tmp_path)[0].wait is None
    with phases.waiting("receive", range(1000), "pp"):
        assert read_places(tmp_path)[0].wait is None
    phases.mark("p" * 39 + "!")
    assert read_places(tmp_path)[0].phase == "p" * 39 + "!"
    phases.mark("p" * 40 + "!")
    assert read_places(tmp_path)[0].phase == "p" * 40


def test_the_latest_marks_are_remembered(tmp_path: Path):
    phases.record_into(tmp_path, 4)
    phases.at_step(1)
    times = []
    for number in range(2 * phases._PAST):
        phases.mark(phases.LANGUAGE_FORWARD, number)
        times.append(phases.here().at)
    place = read_places(tmp_path)[4]
    assert [each.microbatch for each in place.past] == list(range(phases._PAST, 2 * phases._PAST))
    assert {each.rank for each in place.past} == {4}
    polled = read_places(tmp_path, past=False)[4]
    assert (polled, polled.past) == (place, ())
    assert place.as_of(times[phases._PAST + 7]).words() == (
        f"the phase 'language forward' of step 1, microbatch {phases._PAST + 7}"
    )
    assert place.as_of(times[-1] + 60) == place
    assert place.as_of(times[0]) is None  # forgotten
    assert place.passed(Place(0, step=1, microbatch=phases._PAST, phase="language forward"))
    assert place.passed(Place(0, step=1, microbatch=7, phase="language forward")) is None


def test_rank_step_and_microbatch_0_are_told_like_others(tmp_path: Path):
    phases.record_into(tmp_path, 0)
    phases.at_step(0)
    phases.next_microbatch()
    phases.mark(phases.BRIDGE_BACKWARD)
    assert {rank: place.words() for rank, place in read_places(tmp_path).items()} == {
        0: "the phase 'bridge backward' of step 0, microbatch 0"
    }


_CHILD = """
import sys, time
from mimo_colocated import phases
phases.record_into(sys.argv[1], 5)
phases.at_step(7)
phases.mark(phases.OPTIMIZER)
print("there", flush=True)
time.sleep(600)
"""


def test_a_stopped_and_a_killed_process_are_read_by_another(tmp_path: Path):
    command = [sys.executable, "-c", _CHILD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout.readline() == "there\n"
            place = read_places(tmp_path)[5]
            assert place.words() == "the phase 'optimizer step' of step 7"
            assert place.process_state() in ("S", "R", "D")
            child.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
            assert place.process_state() == "T"
        finally:
            child.kill()
    assert read_places(tmp_path)[5] == place
    assert place.process_state() == ""


def test_another_process_of_the_same_number_is_not_taken_for_it():
    assert Place(0, os.getpid(), phases._process(os.getpid())[1]).process_state() != ""
    assert Place(0, os.getpid(), 1).process_state() == ""


def test_files_that_are_not_whole_are_left_out(tmp_path: Path):
    phases.record_into(tmp_path, 0)
    (tmp_path / "phase_1.bin").write_bytes(b"short")
    (tmp_path / "phase_2.bin").write_bytes(b"x" * phases.SIZE)
    assert list(read_places(tmp_path)) == [0]


def test_backward_marks_only_what_needs_a_gradient():
    import torch

    phases.at_step(1)
    weight = torch.ones(2, requires_grad=True)
    phases.next_microbatch()
    first = phases.when_gradient_arrives(weight * 2, phases.ENCODER_BACKWARD)
    second = phases.when_gradient_arrives(first * 3, phases.LANGUAGE_BACKWARD, 7)
    seen = []
    first.register_hook(lambda _: seen.append(phases.here()))
    second.register_hook(lambda _: seen.append(phases.here()))
    second.sum().backward()
    assert [(p.phase, p.microbatch) for p in seen] == [
        (phases.LANGUAGE_BACKWARD, 7),
        (phases.ENCODER_BACKWARD, 0),
    ]
    assert torch.equal(weight.grad, torch.full((2,), 6.0))
    phases.next_microbatch()  # another one is current when the first one's backward runs
    phases.when_gradient_arrives(weight.sum(), phases.BRIDGE_BACKWARD, 0).backward()
    assert phases.here().microbatch == 0
    still = torch.ones(1)
    assert phases.when_gradient_arrives(still, phases.DATA) is still
    assert phases.when_gradient_arrives(None, phases.DATA) is None
