# SPDX-License-Identifier: Apache-2.0
"""pins.env, pyproject.toml and the start-up hook name versions; they have to agree."""

from __future__ import annotations

import re
import sys

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from mimo_colocated import __version__, _startup
from tests.packaging.venvs import REPO

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
PINS = dict(re.findall(r"^PIN_(\w+)=(\S+)$", (REPO / "pins.env").read_text(), re.MULTILINE))


def requirements(name: str) -> list[Requirement]:
    texts = [*PROJECT["dependencies"], *sum(PROJECT["optional-dependencies"].values(), [])]
    return [r for r in map(Requirement, texts) if r.name == name]


def megatron_core(python: str) -> Requirement:
    (found,) = (
        r
        for r in requirements("megatron-core")
        if r.marker is None or r.marker.evaluate({"python_version": python})
    )
    return found


@pytest.mark.parametrize(
    ("python", "pin", "wanted"),
    [
        ("3.10", "BASE", "0.16.1"),
        ("3.11", "BASE", "0.16.1"),
        ("3.12", "NEWEST", "0.19"),
        ("3.13", "NEWEST", "0.19"),
    ],
)
def test_each_python_gets_the_pinned_megatron_core(python: str, pin: str, wanted: str) -> None:
    version = PINS[f"MEGATRON_CORE_{pin}"]
    assert version.startswith(wanted)
    assert megatron_core(python).specifier.contains(version)
    assert _startup.is_supported(version)


@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_hook_and_pyproject_accept_the_same_versions(python: str) -> None:
    edges = {f"0.{minor}.{patch}" for minor in range(14, 22) for patch in range(4)}
    both = [megatron_core("3.11").specifier, megatron_core("3.12").specifier]
    accepted = {v for v in edges if any(s.contains(v) for s in both)}
    assert accepted == {v for v in edges if _startup.is_supported(v)}
    assert set(megatron_core(python).specifier.filter(edges)) <= accepted


@pytest.mark.parametrize(
    "name",
    [
        "torch",
        "einops",
        "captcha",
        "pytest",
        "hypothesis",
        "spmd_types",
        "ruff",
        "pyright",
        "setuptools",
    ],
)
def test_pin_lies_in_the_range_that_users_may_install(name: str) -> None:
    found = requirements(name)
    assert found
    assert all(r.specifier.contains(PINS[name.upper()]) for r in found)


def test_python_versions_agree() -> None:
    assert PROJECT["requires-python"] == f">={PINS['PYTHON_MINIMUM']}"
    assert Version(PINS["PYTHON_BASE"]) < Version("3.12") <= Version(PINS["PYTHON_NEWEST"])


def test_every_pin_is_used_by_the_set_up() -> None:
    users = "".join((REPO / "tools" / f).read_text() for f in ("setup_venv.sh", "find_python.sh"))
    assert {p for p in PINS if f"PIN_{p}" not in users} == set()


def test_supported_text_names_the_supported_versions() -> None:
    for low, _high in _startup.SUPPORTED:
        assert f"{low[0]}.{low[1]}" in _startup.SUPPORTED_TEXT


def test_version_is_a_release_number() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)
