# SPDX-License-Identifier: Apache-2.0
"""SIGKILL at random moments of a save: every restart finds the last complete checkpoint, intact.

All ranks are killed at once; every other save runs in the background. ``MIMO_KILLS`` and
``MIMO_SEED`` choose how often and when; ``make reshape`` does it 20 times.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Any

import pytest

from campaigns.ranks import Ranks
from megatron.core.models.mimo.checkpoint.store import CheckpointStore
from tests.functional.saving_loop import read_journal

PAIR = ("tp=1,dp=2", "tp=2,dp=1")
KILLS = int(os.environ.get("MIMO_KILLS", "6"))
SEED = int(os.environ.get("MIMO_SEED", "1"))
DEADLINE_S = 120
_LOOP = "tests.functional.saving_loop:save_in_a_loop"


class Victim:
    """Starts of the same saving run, one after the other.

    Args:
        folder: of the checkpoints and the journal.
    """

    def __init__(self, folder: Path) -> None:
        self.root, self.journal = folder / "checkpoints", folder / "journal.jsonl"

    def start(self, saves: int = 1000) -> Ranks:
        """Two ranks that save ``saves`` times."""
        return Ranks(2, _LOOP, str(self.root), str(self.journal), PAIR, saves)

    def events(self, name: str) -> list[dict[str, Any]]:
        return [event for event in read_journal(self.journal) if event["event"] == name]

    def seconds(self) -> float:
        """How long the quickest save took so far; a busy machine makes others longer."""
        begun = {event["step"]: event["time"] for event in self.events("begin")}
        return min(e["time"] - begun[e["step"]] for e in self.events("end"))

    def wait_for_saves(self, ranks: Ranks, count: int) -> None:
        """Until ``count`` more saves have begun."""
        wanted = len(self.events("begin")) + count
        deadline = time.monotonic() + DEADLINE_S
        while len(self.events("begin")) < wanted:
            assert not ranks.wait(0.005), "it ended by itself"
            assert time.monotonic() < deadline, "no save began"

    def wait_for_a_folder(self, ranks: Ranks) -> None:
        """Until a save has somewhere to write."""
        deadline = time.monotonic() + DEADLINE_S
        while not any(self.root.glob(".saving_0*")):
            assert not ranks.wait(0.001), "it ended by itself"
            assert time.monotonic() < deadline, "no save goes on"

    def newest(self) -> int:
        return max(CheckpointStore(self.root, {}).steps(), default=0)


def finish(ranks: Ranks) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not ranks.wait(0.1):
        assert time.monotonic() < deadline, "it hangs"


@pytest.mark.once
def test_every_restart_finds_the_last_complete_checkpoint(tmp_path: Path) -> None:
    print(f"MIMO_SEED={SEED} MIMO_KILLS={KILLS}")  # shown with -s, and when it fails
    chance, victim = random.Random(SEED), Victim(tmp_path)
    with victim.start(saves=3) as ranks:
        finish(ranks)
    left_partial = 0
    for number in range(KILLS):
        before = victim.newest()
        with victim.start() as ranks:
            victim.wait_for_saves(ranks, chance.choice([1, 1, 2]))
            if number % 2:  # there is a folder for half of a save only
                victim.wait_for_a_folder(ranks)
                time.sleep(chance.choice([0, chance.uniform(0, 0.5 * victim.seconds())]))
            else:
                time.sleep(chance.uniform(0, 1.1 * victim.seconds()))
            ranks.kill()
        newest = victim.newest()
        # The restart before this kill found what the kill before it had left, and its content
        # was right, else its ranks would have ended by themselves.
        assert victim.events("found")[-1]["step"] == before
        # Nothing complete is lost, nothing incomplete is found.
        assert victim.events("end")[-1]["step"] <= newest <= victim.events("begin")[-1]["step"]
        left_partial += any(victim.root.glob(".saving_0*"))
    # Some did fall into the part of a save that leaves something behind.
    assert left_partial
    newest = victim.newest()
    with victim.start(saves=2) as ranks:
        finish(ranks)
    assert victim.events("found")[-1]["step"] == newest
    print(f"{KILLS} kills, {left_partial} left a checkpoint half written; none was picked up")
    names = sorted(path.name for path in victim.root.iterdir())
    assert names == [f"step_{step:08d}" for step in (newest + 1, newest + 2)]
