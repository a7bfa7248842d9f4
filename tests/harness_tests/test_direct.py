# SPDX-License-Identifier: Apache-2.0
"""``torchrun -m pytest``: multi-rank tests of that size and one-process tests run on each rank."""

from __future__ import annotations

import re
from pathlib import Path

from tests.harness_tests.project import run_project

_MIXED = """
import pytest
import torch.distributed as dist

def test_one_process():
    assert not dist.is_initialized()

@pytest.mark.ranks(2)
def test_two():
    dist.barrier()

@pytest.mark.ranks(4)
def test_four():
    raise AssertionError("must not run on two ranks")
"""

_FAILS = """
import pytest
import torch.distributed as dist

@pytest.mark.ranks(2)
def test_fails_on_rank_1():
    dist.barrier()
    assert dist.get_rank() == 0, "the text of rank one"

@pytest.mark.ranks(2)
def test_goes_on():
    dist.barrier()
"""


def test_other_sizes_are_deselected_and_only_rank_0_prints(tmp_path: Path) -> None:
    result = run_project(tmp_path, {"test_mixed.py": _MIXED}, torchrun=2)
    assert result.returncode == 0, result.output
    assert re.findall(r"2 passed, 1 deselected", result.output) == ["2 passed, 1 deselected"]
    assert "skipped" not in result.output


def test_failing_rank_prints_its_text_and_rank_0_names_it(tmp_path: Path) -> None:
    result = run_project(tmp_path, {"test_fails.py": _FAILS}, torchrun=2)
    assert result.returncode == 1
    assert "rank 1: test_fails.py::test_fails_on_rank_1" in result.output
    own = result.output[result.output.index("===== rank 1 =====") :]
    assert "AssertionError: the text of rank one" in own
    assert "1 failed, 1 passed" in own
