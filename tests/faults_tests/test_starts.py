# SPDX-License-Identifier: Apache-2.0
"""The job that faults are made in is the digits job."""

from __future__ import annotations

from tests.faults.starts import launch


def test_its_command_line_is_the_jobs(capsys) -> None:
    assert launch(["--steps", "0"], print) == 2
    assert capsys.readouterr().err.startswith("error: --steps: must be a whole number from 1")
