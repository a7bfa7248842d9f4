# SPDX-License-Identifier: Apache-2.0
"""What is shown of a rank that died."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.records import RankLog

_CRASHES = """
import os
import pytest
def step(depth):
    step(depth - 1) if depth else os.abort()
def test_a():
    os.write(2, b"free(): invalid pointer\\n")
    step(3)
"""
_TALKS = "print(*range(100), sep='\\n')"


@pytest.mark.parametrize("crashes", [True, False])
def test_the_tail_of_a_crash_is_where_it_crashed(tmp_path: Path, crashes: bool) -> None:
    (tmp_path / "test_a.py").write_text(_CRASHES)
    log = tmp_path / "logs" / "1" / "stdout.log"
    log.parent.mkdir(parents=True)
    pytest_options = ["-m", "pytest", "-p", "numpy", "--capture=tee-sys", "test_a.py"]
    with log.open("wb") as file:
        subprocess.run(
            [sys.executable, *(pytest_options if crashes else ["-c", _TALKS])],
            cwd=tmp_path,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    text, tail = log.read_text(), RankLog(tmp_path, 1).output_tail().splitlines()
    if not crashes:
        assert tail == [str(number) for number in range(60, 100)]
        return
    assert text.count("_pytest/") > 10
    assert "\nExtension modules: " in text
    assert not any("_pytest/" in line or "Extension modules" in line for line in tail)
    assert "Fatal Python error: Aborted" in tail
    said = next(n for n, line in enumerate(tail) if line.endswith("free(): invalid pointer"))
    assert said < tail.index("Fatal Python error: Aborted")
    assert sum(line.endswith("in step") for line in tail) == 4
    assert tail[-1].endswith("in test_a")
