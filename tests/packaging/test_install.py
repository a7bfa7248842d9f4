# SPDX-License-Identifier: Apache-2.0
"""Installing and uninstalling next to a stock megatron-core, in throw-away environments."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.packaging.venvs import NAMES, REPO, ThrowAwayVenv, copy_checkout

GRID, MIMO = NAMES
_RELATIVE = {GRID: "hyper_comm_grid.py", MIMO: "models/mimo/__init__.py"}


def expected(core: Path) -> dict[str, Path]:
    return {name: core / relative for name, relative in _RELATIVE.items()}


@pytest.fixture
def environment(tmp_path: Path) -> ThrowAwayVenv:
    made = ThrowAwayVenv(tmp_path / "venv")
    made.add_megatron_core()
    return made


def assert_stock_is_back(environment: ThrowAwayVenv) -> None:
    environment.assert_stock_untouched()
    assert environment.where() == expected(environment.site / "megatron" / "core")
    left = {p.name for p in environment.site.iterdir()}
    assert not {name for name in left if "mimo" in name}


def test_wheel_overlays_the_names_and_its_removal_gives_the_stock_ones_back(
    environment: ThrowAwayVenv, tmp_path: Path
) -> None:
    checkout = copy_checkout(tmp_path / "checkout")
    environment.install(str(checkout))
    environment.assert_stock_untouched()
    overlay = environment.site / "mimo_colocated" / "_overlay" / "core"
    assert environment.where() == expected(overlay)

    source = checkout / "megatron" / "core"
    files = [source / "hyper_comm_grid.py", *(source / "models" / "mimo").rglob("*.py")]
    installed = {p.relative_to(overlay): p.read_bytes() for p in overlay.rglob("*.py")}
    assert installed == {p.relative_to(source): p.read_bytes() for p in files}

    # The wheel carries the program that a recipe names.
    environment.lend_outer_packages()
    command = ("-W", "ignore", "-m", "mimo_colocated", "train", "digits", "--print")
    assert "\njob: digits\n" in environment.run(*command).stdout
    environment.take_outer_packages_back()

    environment.uninstall()
    assert_stock_is_back(environment)


@pytest.mark.once
def test_editable_resolves_to_the_checkout_with_edits_visible(
    environment: ThrowAwayVenv, tmp_path: Path
) -> None:
    checkout = copy_checkout(tmp_path / "checkout")
    environment.install("--editable", str(checkout))
    environment.assert_stock_untouched()
    core = checkout / "megatron" / "core"
    assert environment.where() == expected(core)

    grid = core / "hyper_comm_grid.py"
    grid.write_text(grid.read_text() + "\nEDITED = 'seen'\n")
    environment.lend_outer_packages()
    edited = environment.run("-W", "ignore", "-c", f"import {GRID} as g; print(g.EDITED)")
    environment.take_outer_packages_back()
    assert edited.stdout.split()[-1] == "seen"

    environment.uninstall()
    assert_stock_is_back(environment)


def test_start_up_loads_the_hook_and_nothing_else(tmp_path: Path) -> None:
    environment = ThrowAwayVenv(tmp_path / "venv")
    show = "import sys, json; print(json.dumps(sorted(sys.modules)))"
    before = set(json.loads(environment.run("-c", show).stdout))
    environment.install(str(REPO))
    after = environment.run("-c", show)
    assert set(json.loads(after.stdout)) - before == {"mimo_colocated", "mimo_colocated._startup"}
    assert after.stderr == ""
