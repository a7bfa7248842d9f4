# SPDX-License-Identifier: Apache-2.0
"""The server that forks tests, on toys; it imports pytest only."""

from __future__ import annotations

import os
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
    pathlib.Path(f"pid{rank}").write_text(str(os.getpid()))
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
    running.close()
    assert all(gone(int((tmp_path / f"pid{rank}").read_text())) for rank in range(2))


def test_the_server_ends_with_its_client(tmp_path: Path) -> None:
    running = ForkServer(tmp_path, dict(os.environ), ["pytest"])
    running.close()
    assert running.returncode == 0
