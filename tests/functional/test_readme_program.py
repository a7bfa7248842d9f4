# SPDX-License-Identifier: Apache-2.0
"""The README's training program, unchanged, on one process and on eight: the same losses."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.functional.readme_blocks import REPO, parse
from tests.harness import programs

LINE = re.compile(r"^step (\d): loss (\d+\.\d+), grad norm (\d+\.\d+)$", re.MULTILINE)
NAME = "tests/functional/test_readme_program.py"
README = REPO / "README.md"


def printed(program: Path, ranks: int = 0) -> list[tuple[float, ...]]:
    """(step, loss, gradient norm) of every line that a run of the program prints."""
    launched = re.compile(r"RANK|WORLD_SIZE|LOCAL_.*|MASTER_.*|TORCHELASTIC_.*|GROUP_.*|ROLE_.*")
    env = {k: v for k, v in os.environ.items() if not launched.fullmatch(k)}
    # Gloo on the CPU, wherever the tests run: eight GPUs are seldom there.
    env |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = programs.run([str(program)], REPO, env, 600, ranks)
    assert done.returncode == 0, done.stderr[-4000:]
    return [tuple(map(float, found)) for found in LINE.findall(done.stdout)]


def test_the_program_prints_the_same_losses_on_one_process_and_on_eight(tmp_path: Path) -> None:
    (block,) = [b for b in parse(README.read_text("utf-8"), README) if b.argument == NAME]
    program = tmp_path / "program.py"
    program.write_text(block.text)
    one, eight = printed(program), printed(program, ranks=8)
    assert [step for step, *_ in one] == [0, 1, 2]
    # Sums in another order; the losses differ from step to step by far more.
    assert eight == [pytest.approx(line, rel=1e-4) for line in one]
    losses = [loss for _, loss, _ in one]
    assert min(abs(a - b) for a, b in zip(losses, losses[1:], strict=False)) > 1e-2
