# SPDX-License-Identifier: Apache-2.0
"""Check the package's types with pyright, as ``[tool.pyright]`` in ``pyproject.toml`` says.

    python tools/check_types.py [OPTION …]       options go to pyright, e.g. --stats

pyright finds ``megatron.core`` in site-packages and stops there, while the start-up hook puts two
names of this project into it. So pyright gets a folder in which both are one tree: this project's
files over links to the installed ones. Exits 1 if a type is wrong.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OURS = ("megatron/core/hyper_comm_grid.py", "megatron/core/models/mimo", "mimo_colocated")
# Stock's untyped calls: pyright takes the type of what they happen to end with, None or a list.
STOCK = {
    "utils.py": ["unwrap_model"],
    "transformer/spec_utils.py": ["build_module"],
    "tensor_parallel/random.py": ["get_cuda_rng_tracker"],
    "parallel_state.py": ["get_context_parallel_group", "get_tensor_model_parallel_group"],
}
HIDDEN = shutil.ignore_patterns("__pycache__")


def check(options: list[str]) -> int:
    """Return pyright's exit status: 0 if all types are right."""
    with tempfile.TemporaryDirectory() as place:
        merge(Path(place))
        done = subprocess.run(
            [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, *options],
            cwd=place, capture_output=True, text=True, check=False,
        )
        for stream, text in ((sys.stdout, done.stdout), (sys.stderr, done.stderr)):
            stream.write(text.replace(os.path.realpath(place) + os.sep, ""))
        return done.returncode


def merge(place: Path) -> None:
    """Lay this project's files over the installed ``megatron.core`` in the folder ``place``."""
    (stock,) = importlib.util.find_spec("megatron.core").submodule_search_locations
    shutil.copytree(stock, place / "megatron" / "core", ignore=HIDDEN, copy_function=os.symlink)
    shutil.rmtree(place / OURS[1])
    for name in OURS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, place / name, ignore=HIDDEN)
        else:
            (place / name).unlink()
            shutil.copy(ROOT / name, place / name)
    for name, functions in STOCK.items():
        file = place / "megatron" / "core" / name
        lines = [file.read_text("utf-8"), "from typing import Any"]
        lines += [f"def {each}(*args: Any, **kwargs: Any) -> Any: ..." for each in functions]
        file.unlink()
        file.write_text("\n".join(lines), "utf-8")
    shutil.copy(ROOT / "pyproject.toml", place)


if __name__ == "__main__":
    sys.exit(check(sys.argv[1:]))
