# SPDX-License-Identifier: Apache-2.0
"""The server that forks tests, on toys; it imports pytest only."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.fork_server import Forked, ForkServer, Start

RANKS = """
import os, pathlib, time

def test_it():
    rank = int(os.environ["RANK"])
    assert os.environ["WORLD_SIZE"] == "2"
    pathlib.Path(f"new{rank}").write_text(str(os.getpid()))
    os.rename(f"new{rank}", f"pid{rank}")  # never met half-written
    while not pathlib.Path(f"pid{1 - rank}").exists():
        time.sleep(0.01)
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    running = ForkServer(tmp_path_factory.mktemp("server"), dict(os.environ), ["pytest"])
    yield running
    running.close()


def start(server: ForkServer, folder: Path, test: str, ranks: int = 1, **code: str) -> Forked:
    folder.mkdir(exist_ok=True)
    (folder / "pytest.ini").write_text("[pytest]\n")
    (folder / "test_toy.py").write_text(test)
    for name, text in code.items():
        (folder / f"{name}.py").write_text(text)
    arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "test_toy.py"]
    output = str(folder / "output{rank}")
    return Forked(server.address, Start(arguments, str(folder), dict(os.environ), output, ranks))


def gone(pid: int) -> bool:
    """Whether a process has ended, at most some seconds from now; a zombie has."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return True
        if stat.rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


def test_modules_come_from_the_folder_of_the_start(server: ForkServer, tmp_path: Path) -> None:
    """The same names, one after the other: nothing of the first is left in the second."""
    test = "import os, code_of_mine\ndef test_it(): assert code_of_mine.VALUE == 1, os.getcwd()\n"
    codes = []
    for value in (1, 2):
        folder = tmp_path / str(value)
        running = start(server, folder, test, code_of_mine=f"VALUE = {value}\n")
        codes.append(running.wait(60))
    assert codes == [0, 1]
    assert f"AssertionError: {tmp_path / '2'}" in (tmp_path / "2" / "output0").read_text()


def test_ranks_know_who_they_are(server: ForkServer, tmp_path: Path) -> None:
    assert start(server, tmp_path, RANKS, ranks=2).wait(60) == 0
    assert all("1 passed" in (tmp_path / f"output{rank}").read_text() for rank in range(2))


def test_a_rank_that_fails_ends_the_others(server: ForkServer, tmp_path: Path) -> None:
    wait = RANKS + "    assert rank == 0\n    time.sleep(600)\n"
    assert start(server, tmp_path, wait, ranks=2).wait(60) == 1
    assert gone(int((tmp_path / "pid0").read_text()))


def test_a_client_that_goes_away_takes_everything_along(server: ForkServer, tmp_path: Path) -> None:
    running = start(server, tmp_path, RANKS + "    time.sleep(600)\n", ranks=2)
    with pytest.raises(subprocess.TimeoutExpired):
        running.wait(0.1)
    while not all((tmp_path / f"pid{rank}").exists() for rank in range(2)):
        time.sleep(0.05)
    running.close()  # not before they are gone
    pids = [(tmp_path / f"pid{rank}").read_text() for rank in range(2)]
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_the_server_ends_with_its_client(tmp_path: Path) -> None:
    running = ForkServer(tmp_path, dict(os.environ), ["pytest"])
    running.close()
    assert running.returncode == 0


def test_a_program_that_starts_a_thread_cannot_be_forked_from(tmp_path: Path, monkeypatch) -> None:
    """A fork has only the thread that forks; whatever the others were doing would never end."""
    (tmp_path / "library_with_a_thread.py").write_text(
        "import threading, time\n"
        "threading.Thread(target=time.sleep, args=(600,), daemon=True).start()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    with pytest.raises(RuntimeError, match="did not start"):
        ForkServer(tmp_path, environment, ["library_with_a_thread"])


PROGRAM = """
import atexit, json, os, sys, threading, time, warnings
assert not hasattr(json, "seen") and __name__ == "__main__" and sys.stdin.read() == ""
json.seen = True
import of_the_path
atexit.register(lambda: print("at exit", flush=True))
threading.Thread(target=lambda: (time.sleep(0.1), print("a thread", flush=True))).start()
print(sys.argv[1:], os.environ["MINE"], of_the_path.VALUE, os.getcwd(), flush=True)
warnings.warn("for the user")
sys.exit(int(sys.argv[2]))
"""


@pytest.mark.parametrize("kind", ["-c", "script", "-m"])
def test_a_program_runs_as_python_runs_it(server: ForkServer, tmp_path: Path, kind: str) -> None:
    """Twice: nothing of one start is there in the next."""
    (tmp_path / "paths").mkdir()
    (tmp_path / "paths" / "of_the_path.py").write_text("VALUE = 5\n")
    (tmp_path / "program.py").write_text(PROGRAM)
    what = {"-c": ["-c", PROGRAM], "script": ["program.py"], "-m": ["-m", "program"]}[kind]
    environment = {"MINE": "mine", "PYTHONPATH": str(tmp_path / "paths")}
    for code in (0, 3):
        out, err = tmp_path / f"out{code}", tmp_path / f"err{code}"
        asked = Start([*what, "a", str(code)], str(tmp_path), environment, str(out), 0, str(err))
        running = Forked(server.address, asked)
        assert running.wait(60) == code
        said = f"['a', '{code}'] mine 5 {tmp_path}\na thread\nat exit\n"
        assert (out.read_text(), "for the user" in err.read_text()) == (said, True)


def test_an_error_is_told_as_python_tells_it(server: ForkServer, tmp_path: Path) -> None:
    start = Start(["-c", "1 / 0"], str(tmp_path), dict(os.environ), str(tmp_path / "said"))
    assert Forked(server.address, start).wait(60) == 1
    assert (tmp_path / "said").read_text().endswith("\nZeroDivisionError: division by zero\n")


def test_the_rank_that_fails_first_is_named(server: ForkServer, tmp_path: Path) -> None:
    code = "import os, time\nif os.environ['RANK'] == '2': os._exit(7)\ntime.sleep(600)"
    said = str(tmp_path / "said{rank}")
    running = Forked(
        server.address, Start(["-c", code], str(tmp_path), dict(os.environ), said, ranks=3)
    )
    assert (running.wait(60), running.rank) == (7, 2)


def test_the_rank_that_a_signal_ended_comes_before_those_that_lost_it(
    server: ForkServer, tmp_path: Path
) -> None:
    """Both have ended when the server looks: a peer that fails because it lost one is no cause."""
    test = RANKS + "    while not pathlib.Path('go').exists(): time.sleep(0.01)\n"
    test += "    os._exit(1) if rank == 0 else os.kill(os.getpid(), 9)\n"
    running = start(server, tmp_path, test, ranks=2)
    while not all((tmp_path / f"pid{rank}").exists() for rank in range(2)):
        time.sleep(0.05)
    os.kill(running.pid, signal.SIGSTOP)
    try:
        (tmp_path / "go").touch()
        assert all(gone(int((tmp_path / f"pid{rank}").read_text())) for rank in range(2))
    finally:  # a server that stays stopped is waited for
        os.kill(running.pid, signal.SIGCONT)
    assert (running.wait(60), running.rank) == (-signal.SIGKILL, 1)
