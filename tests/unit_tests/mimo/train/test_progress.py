# SPDX-License-Identifier: Apache-2.0
"""What is told of long work where no terminal shows a bar."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from mimo_colocated.cli import progress

pytestmark = pytest.mark.once


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(progress, "EVERY", 0.0)
    return monkeypatch


def _told(capsys: pytest.CaptureFixture[str], total: int | None, unit: str) -> list[str]:
    with progress.bar("reading", total, unit) as tell:
        for _ in range(2):
            tell(2_000_000)
    seen = capsys.readouterr()
    assert not seen.out
    return seen.err.splitlines()


def test_lines_say_how_much_is_done_and_how_long_it_takes(rank, capsys) -> None:
    first, last = _told(capsys, 4_000_000, "samples")
    assert first.startswith("reading: 2000000 samples of 4000000 samples, ")
    assert last == "reading: 4000000 samples of 4000000 samples, 00:00 left"


def test_bytes_are_said_in_their_unit_and_without_a_total_no_time(rank, capsys) -> None:
    assert _told(capsys, None, "B") == ["reading: 2.00MB", "reading: 4.00MB"]


def test_what_is_short_says_nothing(rank, capsys) -> None:
    rank.setattr(progress, "EVERY", 30.0)
    assert not _told(capsys, None, "B")


def test_other_ranks_say_nothing(rank, capsys) -> None:
    rank.setattr(dist, "get_rank", lambda: 1)
    assert not _told(capsys, None, "B")
