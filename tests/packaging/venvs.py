# SPDX-License-Identifier: Apache-2.0
"""Throw-away virtual environments for the packaging tests; nothing here needs a network.

Each gets a copy of the stock megatron-core that is installed in the environment under test,
checked against the hashes its wheel was published with. ``torch`` and the rest are lent to it
through one ``.pth`` line, which adds a folder to ``sys.path`` but runs none of that folder's own
``.pth`` files: an editable install out there cannot answer for the one in here.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from packaging.requirements import Requirement

REPO = Path(__file__).resolve().parents[2]
NAMES = ("megatron.core.hyper_comm_grid", "megatron.core.models.mimo")
DISTRIBUTION = "megatron-mimo-colocated"
_OUTER = Path(sysconfig.get_paths()["purelib"])
_TIMEOUT = 300

_WHERE = """
import importlib, json, sys
print(json.dumps({name: importlib.import_module(name).__file__ for name in sys.argv[1:]}))
"""


def copy_checkout(target: Path) -> Path:
    """Copy what an install reads, so that a test may edit it."""
    target.mkdir()
    junk = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in ("mimo_colocated", "megatron", "examples/mimo/digits"):
        shutil.copytree(REPO / name, target / name, ignore=junk)
    for name in ("pyproject.toml", "setup.py", "LICENSE", "pins.env", "README.md"):
        if (REPO / name).exists():
            shutil.copy(REPO / name, target / name)
    return target


def _published(distribution: importlib.metadata.Distribution) -> dict[str, str]:
    """Return path -> sha256 (urlsafe base64, unpadded) as the wheel's RECORD lists them."""
    return {str(f): f.hash.value for f in distribution.files or [] if f.hash is not None}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256(path.read_bytes()).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def _build_requirements() -> list[importlib.metadata.Distribution]:
    """Return the build backend's distribution and those it needs."""
    waiting, found = ["setuptools"], {}
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found[name] = importlib.metadata.distribution(name)
        for text in found[name].requires or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return list(found.values())


class ThrowAwayVenv:
    """A virtual environment without pip, driven by the pip of the environment under test."""

    def __init__(self, path: Path) -> None:
        self.path = path
        venv.create(path, with_pip=False, symlinks=True)
        self.python = path / "bin" / "python"
        self.site = next((path / "lib").glob("python3*")) / "site-packages"
        self._lend = self.site / "zzz_outer.pth"
        self._backend = path / "build-backend"

    def run(
        self, *args: str, check: bool = True, **extra_env: str
    ) -> subprocess.CompletedProcess[str]:
        """Run this environment's Python from the root folder, with a clean environment."""
        env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "MIMO_"))}
        done = subprocess.run(
            [str(self.python), *args],
            cwd="/",
            env={**env, "PYTHONDONTWRITEBYTECODE": "1", **extra_env},
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
            check=False,
        )
        assert not check or done.returncode == 0, f"{args}:\n{done.stdout}\n{done.stderr}"
        return done

    def pip(self, *args: str) -> None:
        """Run the outer environment's pip on this one, which lends it the build backend only."""
        command = [sys.executable, "-m", "pip", "--python", str(self.python), *args]
        env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        env["PYTHONPATH"] = str(self._link_backend())
        done = subprocess.run(
            command, cwd="/", env=env, capture_output=True, text=True, timeout=_TIMEOUT, check=False
        )
        assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"

    def _link_backend(self) -> Path:
        if not self._backend.exists():
            self._backend.mkdir()
            for distribution in _build_requirements():
                for top in {f.parts[0] for f in distribution.files or [] if f.parts[0] != ".."}:
                    source = Path(str(distribution.locate_file(top)))
                    if top != "__pycache__" and source.exists():
                        (self._backend / top).symlink_to(source)
        return self._backend

    def install(self, *args: str) -> None:
        """Install this project, alone; it must be asked for what it needs by other tests."""
        self.pip("install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", *args)

    def uninstall(self) -> None:
        """Uninstall this project."""
        self.pip("uninstall", "--quiet", "--yes", DISTRIBUTION)

    def add_megatron_core(self) -> None:
        """Copy the stock megatron-core in, exactly the files its wheel was published with."""
        distribution = importlib.metadata.distribution("megatron-core")
        for name in _published(distribution):
            (self.site / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(str(distribution.locate_file(name)), self.site / name)
        # Files without a hash of their own that pip needs to see the distribution.
        info = f"megatron_core-{distribution.version}.dist-info"
        for name in (f"{info}/RECORD", f"{info}/INSTALLER"):
            shutil.copy(str(distribution.locate_file(name)), self.site / name)
        self.assert_stock_untouched()

    def assert_stock_untouched(self) -> None:
        """Every stock file has the hash it was published with, and there is no other file."""
        published = _published(importlib.metadata.distribution("megatron-core"))
        wrong = [n for n, sha in published.items() if _sha256(self.site / n) != sha]
        assert not wrong
        here = self.site / "megatron"
        present = {str(p.relative_to(self.site)) for p in here.rglob("*") if p.is_file()}
        assert present == {n for n in published if n.startswith("megatron/")}

    def lend_outer_packages(self) -> None:
        """Let this environment see torch and the rest, after its own packages."""
        self._lend.write_text(f"{_OUTER}\n")

    def take_outer_packages_back(self) -> None:
        """Undo ``lend_outer_packages``, so that pip sees this environment's packages only."""
        self._lend.unlink()

    def where(self) -> dict[str, Path]:
        """Return the file each of the two names resolves to, imported with outer packages lent."""
        self.lend_outer_packages()
        try:
            done = self.run("-W", "ignore", "-c", _WHERE, *NAMES)
        finally:
            self.take_outer_packages_back()
        return {name: Path(file) for name, file in json.loads(done.stdout.splitlines()[-1]).items()}
