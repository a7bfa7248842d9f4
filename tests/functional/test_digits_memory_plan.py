# SPDX-License-Identifier: Apache-2.0
"""``--memory-plan`` of the digits job: a table, and no rank is started. One process."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.functional.digits_job import TRAIN

pytestmark = pytest.mark.once


def test_the_plan_is_printed_and_nothing_runs(tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, str(TRAIN), "--memory-plan", "--out", str(out)]
    options = ["--vision", "tp=1,dp=8", "--language", "cp=2,pp=2,dp=2", "--micro-batches", "4",
               "--encode-ahead", "1", "--freeze", "projector", "--backend", "gloo"]  # fmt: skip
    done = subprocess.run(command + options, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "4 microbatches a step, 2 pipeline stages, 1 encoded together" in done.stdout
    kept = [line for line in done.stdout.splitlines() if line.startswith("│ keep ")]
    assert len(kept) == 3
    # 4 images of 4 patches on a rank: rows of 64 numbers, two hidden layers of 128, 4 bytes each.
    parts = [float(cell) for cell in kept[0].split("│")[3:4]]
    layers = 2 * (2 + 2 + 3 + 1 + 1 + 8) * 64 * 4 + 2 * (16 + 32)
    expected = 16 * (16 * 4 + layers + 64 * 4 + 8 + (64 + 256) * 4)
    assert parts == [round(expected / 2**20, 2)]
    assert not out.exists()
