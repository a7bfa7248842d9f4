# SPDX-License-Identifier: Apache-2.0
"""What ``setup.py`` builds: file lists, metadata, and a checkout that stays as it was."""

from __future__ import annotations

import email
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from mimo_colocated import __version__
from tests.packaging.venvs import copy_checkout

NAME = f"megatron_mimo_colocated-{__version__}"
BUILD = "import sys; from setuptools import build_meta as b; print(getattr(b, sys.argv[1])('dist'))"
# The pip that comes with Python 3.10 and 3.11 reads no newer metadata.
METADATA_VERSION = (2, 4)


def build(kind: str, checkout: Path) -> Path:
    """Build as ``python -m build`` and pip do, without their environment of its own."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        [sys.executable, "-c", BUILD, f"build_{kind}"],
        cwd=checkout,
        env={**env, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return checkout / "dist" / done.stdout.splitlines()[-1]


def content(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return copy_checkout(tmp_path / "checkout")


def test_wheel_holds_the_package_the_modules_and_the_pth_and_leaves_the_checkout_alone(
    checkout: Path,
) -> None:
    before = files_below(checkout)
    wheel = build("wheel", checkout)
    built = content(wheel)
    wheel.unlink()
    assert files_below(checkout) == before

    code = {n: text for n, text in built.items() if not n.startswith(f"{NAME}.dist-info/")}
    wanted = {
        name.replace("megatron/", "mimo_colocated/_overlay/"): text
        for name, text in before.items()
        if name.split("/")[0] in ("mimo_colocated", "megatron") and not name.endswith(".pth")
    }
    digits = "examples/mimo/digits/"
    wanted |= {
        f"mimo_colocated/_examples/{name}": text
        for name, text in before.items()
        if name.startswith(digits) and name.endswith(".py")
    }
    assert any("_examples" in name for name in wanted)
    pth = "megatron_mimo_colocated.pth"
    assert code == {**wanted, pth: before[f"mimo_colocated/{pth}"]}
    metadata = email.message_from_bytes(built[f"{NAME}.dist-info/METADATA"])
    assert metadata["Version"] == __version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert tuple(map(int, metadata["Metadata-Version"].split("."))) <= METADATA_VERSION


def test_wheel_of_the_sdist_is_the_wheel_of_the_checkout(checkout: Path, tmp_path: Path) -> None:
    direct = content(build("wheel", checkout))
    with tarfile.open(build("sdist", checkout)) as opened:
        opened.extractall(tmp_path / "unpacked")
    unpacked = tmp_path / "unpacked" / NAME
    made = ("dist/", "megatron_mimo_colocated.egg-info/")
    needed = [name for name in files_below(checkout) if not name.startswith(made)]
    assert set(needed) <= set(files_below(unpacked))
    assert content(build("wheel", unpacked)) == direct


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_a_module_that_went_away_is_in_no_later_build(kind: str, checkout: Path) -> None:
    extra = checkout / "megatron" / "core" / "models" / "mimo" / "extra.py"
    extra.write_text("")

    def names() -> set[str]:
        archive = build(kind, checkout)
        if kind == "wheel":
            return set(content(archive))
        with tarfile.open(archive) as opened:
            return set(opened.getnames())

    assert any(name.endswith("extra.py") for name in names())
    extra.unlink()
    assert not any(name.endswith("extra.py") for name in names())
