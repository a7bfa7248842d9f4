# SPDX-License-Identifier: Apache-2.0
"""Signals to stop: remembered, agreed on by all ranks, and the second one taken at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from mimo_colocated import stop_requests
from mimo_colocated.launch.stopping import RankSignals
from mimo_colocated.stop_requests import SIGNALS, StopRequests
from tests.unit_tests.mimo.in_process_ranks import InProcessWorld

pytestmark = pytest.mark.once

OWN = {"use_local_synchronization": True}


def send(sent: signal.Signals, arrived: Callable[[], object]) -> None:
    """Send a signal to this process, and wait until the thread that receives it has done so."""
    os.kill(os.getpid(), sent)
    deadline = time.monotonic() + 30
    while not arrived():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("sent", SIGNALS)
def test_a_signal_is_remembered_and_the_process_goes_on(sent: signal.Signals) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopRequests() as requests:
        assert requests.asked is requests.agreed() is None
        send(sent, lambda: requests.asked)
        assert requests.asked is requests.agreed() is sent
    assert [signal.getsignal(number) for number in SIGNALS] == before
    with StopRequests() as others:  # once more in the same process
        assert others.asked is None
        send(sent, lambda: others.asked)


def test_the_more_urgent_signal_is_told_whatever_came_first() -> None:
    with StopRequests() as requests:
        send(signal.SIGUSR1, lambda: requests.asked)
        send(signal.SIGTERM, lambda: requests.asked is signal.SIGTERM)
        assert requests.agreed() is signal.SIGTERM


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_what_one_rank_is_asked_all_ranks_agree_on(ranks: int) -> None:
    world = InProcessWorld(ranks)

    def body(rank: int) -> list[signal.Signals | None]:
        requests, group = StopRequests(), dist.new_group(range(ranks), **OWN)
        found = [requests.agreed(group=group)]
        if rank == ranks - 1:
            requests.ask(signal.SIGUSR1)
        found.append(requests.agreed(group=group))
        if rank == 0:
            requests.ask()
        return [*found, requests.agreed(group=group)]

    told = world.run(body)
    assert told == [[None, signal.SIGUSR1, signal.SIGTERM]] * ranks


def test_signals_that_are_the_same_request_do_not_end_the_process() -> None:
    """A scheduler signals launcher and ranks, and the launcher passes it on."""
    seen: list[tuple[signal.Signals, bool]] = []

    def look(sent: signal.Signals, again: bool) -> bool:
        seen.append((sent, again))
        return again  # a wrong one must not end the tests

    with StopRequests(look, same_request_s=600) as requests:
        for count in range(1, 4):
            send(signal.SIGTERM, lambda count=count: len(seen) == count)
        send(signal.SIGUSR1, lambda: len(seen) == 4)
    assert seen == [*[(signal.SIGTERM, False)] * 3, (signal.SIGUSR1, False)]
    assert requests.asked is signal.SIGTERM


def test_who_looks_at_signals_first_may_keep_them() -> None:
    seen: list[bool] = []

    def keep(_sent: signal.Signals, again: bool) -> bool:
        seen.append(again)
        return True

    with StopRequests(keep, same_request_s=0) as requests:
        for count in range(1, 3):
            send(signal.SIGTERM, lambda count=count: len(seen) == count)
        send(signal.SIGUSR1, lambda: len(seen) == 3)
    assert (seen, requests.asked) == ([False, True, False], None)


def test_a_second_sigterm_is_counted_from_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signals that keep coming end the process, however short the time between two of them."""
    times, seen = iter([10.0, 11.5, 13.0]), []
    monkeypatch.setattr(stop_requests, "time", SimpleNamespace(monotonic=lambda: next(times)))
    requests = StopRequests(lambda _sent, again: seen.append(again) or True, same_request_s=2.0)
    for _ in range(3):
        requests._received(signal.SIGTERM)
    assert seen == [False, False, True]


def test_handlers_of_before_come_back() -> None:
    def mine(_number: int, _frame: object) -> None:
        pass

    before = signal.signal(signal.SIGUSR1, mine)
    try:
        with StopRequests():
            assert signal.getsignal(signal.SIGUSR1) is not mine
        assert signal.getsignal(signal.SIGUSR1) is mine
    finally:
        signal.signal(signal.SIGUSR1, before)


_STUCK = """
import ctypes, sys
from mimo_colocated import stop_requests
from mimo_colocated.stop_requests import StopRequests
StopRequests(same_request_s=0).install()
mutex = ctypes.create_string_buffer(256)
lock = ctypes.CDLL(None).pthread_mutex_lock
lock(mutex)
print("stuck", flush=True)
lock(mutex)  # in C for ever, which no handler of Python interrupts: like a collective
"""


def test_a_second_sigterm_ends_a_process_that_is_stuck_in_a_collective() -> None:
    process = subprocess.Popen([sys.executable, "-c", _STUCK], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "stuck\n"
        process.send_signal(signal.SIGUSR1)
        process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == -signal.SIGTERM
    finally:
        process.kill()


@pytest.mark.parametrize("from_a_thread", [False, True])
def test_a_forked_worker_that_is_ended_asks_nobody_to_stop(from_a_thread: bool) -> None:
    ends: list[int] = []

    def work() -> None:
        pid = os.fork()
        if pid == 0:
            time.sleep(60)
            os._exit(0)
        os.kill(pid, signal.SIGTERM)
        ends.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

    with StopRequests() as requests:
        if from_a_thread:
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        else:
            work()
        assert ends == [-signal.SIGTERM]
        send(signal.SIGUSR1, lambda: requests.asked)  # what came before has been received, too
        assert requests.asked is signal.SIGUSR1


def test_signals_have_one_receiver() -> None:
    with StopRequests() as requests, pytest.raises(RuntimeError, match=r"close\(\) them first"):
        StopRequests().install()
    assert requests.asked is None
    errors: list[ValueError] = []

    def install() -> None:
        try:
            StopRequests().install()
        except ValueError as error:
            errors.append(error)

    thread = threading.Thread(target=install)
    thread.start()
    thread.join()
    assert "main thread" in str(errors[0])
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing)
    try:
        with pytest.raises(RuntimeError, match="an event loop receives"):
            StopRequests().install()
    finally:
        assert signal.set_wakeup_fd(-1) == writing
        os.close(reading)
        os.close(writing)


def test_a_request_is_not_lost_with_what_looked_at_it_first(capsys: pytest.CaptureFixture) -> None:
    def fails(sent: signal.Signals, again: bool) -> bool:
        raise OSError("no space left")

    with StopRequests(fails) as requests:
        for sent in (signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), sent)
            deadline = time.monotonic() + 30
            while requests.asked is not sent and time.monotonic() < deadline:
                time.sleep(0.001)
            assert requests.asked is sent
    assert "OSError: no space left" in capsys.readouterr().err


def test_a_rank_may_be_told_as_soon_as_it_receives_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    def install(requests: StopRequests) -> StopRequests:
        requests._received(signal.SIGUSR1)
        return requests

    monkeypatch.setattr(StopRequests, "install", install)
    monkeypatch.setattr("traceback.print_exc", lambda: pytest.fail("what it reads was not there"))
    assert RankSignals(0, stops=True, say=None).requests.asked is signal.SIGUSR1
