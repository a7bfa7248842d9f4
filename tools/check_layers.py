# SPDX-License-Identifier: Apache-2.0
"""Check which rooms of the package import which, by the contract in ``layers.ini``.

    python tools/check_layers.py [FOLDER]       default: megatron/core/models/mimo

import-linter looks for a package by its name, and ``megatron.core`` is the installed one. So it
gets a copy of the folder under the name ``mimo``. Exits 1 if a room imports one above it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

from importlinter.cli import lint_imports

PACKAGE = "megatron.core.models.mimo"


def check(folder: Path) -> int:
    """Return 0 if the package in ``folder`` keeps the contract, 1 if it does not."""
    contract = Path(__file__).with_name("layers.ini").resolve()
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / "mimo"
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("__pycache__"))
        for file in copy.rglob("*.py"):
            file.write_text(file.read_text("utf-8").replace(PACKAGE, "mimo"), "utf-8")
        with contextlib.chdir(place) if hasattr(contextlib, "chdir") else _at(place):
            sys.path.insert(0, place)
            return lint_imports(config_filename=str(contract), no_cache=True)


@contextlib.contextmanager
def _at(place: str):  # noqa: ANN202 -- Python 3.10 has no contextlib.chdir
    before = os.getcwd()
    os.chdir(place)
    try:
        yield
    finally:
        os.chdir(before)


if __name__ == "__main__":
    sys.exit(check(Path(*sys.argv[1:2] or [PACKAGE.replace(".", "/")])))
