# SPDX-License-Identifier: Apache-2.0
"""The rooms of the package import only rooms below them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[3]
PACKAGE = ROOT / "megatron" / "core" / "models" / "mimo"


def check(folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools" / "check_layers.py"), str(folder)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize(
    "file, line, words",
    [
        (None, "", "2 kept, 0 broken"),
        ("comm/exchange.py", "import megatron.core.models.mimo.model.base", "comm.exchange ->"),
        ("comm/plan/routes.py", "import torch", "mimo.comm.plan.routes -> torch"),
        (
            "comm/plan/routes.py",
            "import megatron.core.models.mimo.comm.exchange",
            "mimo.comm.plan.routes -> mimo.comm.exchange",
        ),
        ("new_room/__init__.py", "", "new_room"),
    ],
)
def test_imports_go_down(tmp_path: Path, file: str | None, line: str, words: str) -> None:
    folder = tmp_path / "package"
    shutil.copytree(PACKAGE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    if file is not None:
        (folder / file).parent.mkdir(exist_ok=True)
        with (folder / file).open("a") as module:
            module.write(f"\n{line}\n")
    found = check(folder)
    assert words in found.stdout
    assert found.returncode == (0 if file is None else 1)
