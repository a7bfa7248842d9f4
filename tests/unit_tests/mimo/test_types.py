# SPDX-License-Identifier: Apache-2.0
"""``tools/check_types.py`` sees this project's modules within the installed Megatron-Core.

That the package itself has no wrong type is `make lint`'s to say; this is the control.
"""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

_PLANTED = """
from megatron.core.hyper_comm_grid import GridShape
from megatron.core.transformer.spec_utils import build_module

right: int = GridShape((2,), ("tp",)).dim_size("tp")
build_module(None).anything
wrong: str = right
"""


@pytest.mark.once
def test_our_modules_are_seen_over_stock_and_a_wrong_type_is_an_error(tmp_path: Path) -> None:
    merge = runpy.run_path(str(ROOT / "tools" / "check_types.py"))["merge"]
    merge(tmp_path)
    (tmp_path / "planted.py").write_text(_PLANTED)
    found = subprocess.run(
        [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "planted.py"],
        cwd=tmp_path, capture_output=True, text=True,
    )
    assert found.returncode == 1, found.stdout + found.stderr
    assert '"int" is not assignable to "str"' in found.stdout
    assert "planted.py:7" in found.stdout
    assert "1 error," in found.stdout
