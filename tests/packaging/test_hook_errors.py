# SPDX-License-Identifier: Apache-2.0
"""What an import says where something is missing or of a version that is not supported.

The environments hold this project's wheel and a few made-up files: no torch, no Megatron-Core.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mimo_colocated import _startup
from tests.packaging.venvs import NAMES, REPO, ThrowAwayVenv


@pytest.fixture(scope="module")
def with_wheel(tmp_path_factory: pytest.TempPathFactory) -> ThrowAwayVenv:
    made = ThrowAwayVenv(tmp_path_factory.mktemp("hook") / "venv")
    made.install(str(REPO))
    return made


def fake_megatron(root: Path, *, package_info: str | None, metadata: str | None) -> str:
    """Make a megatron.core that imports nothing; return the folder to put on PYTHONPATH."""
    models = root / "megatron" / "core" / "models"
    models.mkdir(parents=True)
    (models / "__init__.py").touch()
    # Stock megatron.core imports the grid while it is itself half imported.
    (models.parent / "__init__.py").write_text("import megatron.core.hyper_comm_grid\n")
    if package_info is not None:
        (models.parent / "package_info.py").write_text(f"__version__ = {package_info!r}\n")
    if metadata is not None:
        info = root / f"megatron_core-{metadata}.dist-info"
        info.mkdir()
        text = f"Metadata-Version: 2.1\nName: megatron-core\nVersion: {metadata}\n"
        (info / "METADATA").write_text(text)
    return str(root)


def import_error(environment: ThrowAwayVenv, name: str, **env: str) -> str:
    done = environment.run("-c", f"import {name}", check=False, **env)
    assert done.returncode == 1
    return done.stderr.splitlines()[-1]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("package_info", "metadata", "version"),
    [
        ("0.15.2", "0.15.2", "0.15.2"),
        ("0.20.0", None, "0.20.0"),
        (None, "0.17.0", "0.17.0"),
        # The files that Python found count, not a distribution that lies about elsewhere.
        ("0.16.0", "0.16.1", "0.16.0"),
    ],
)
def test_unsupported_version_is_named_with_those_that_are(
    with_wheel: ThrowAwayVenv,
    tmp_path: Path,
    name: str,
    package_info: str | None,
    metadata: str | None,
    version: str,
) -> None:
    path = fake_megatron(tmp_path, package_info=package_info, metadata=metadata)
    assert re.fullmatch(
        r"ImportError: megatron-mimo-colocated does not support megatron-core "
        rf"{re.escape(version)}; supported are 0\.16\.1 .* and 0\.19\.x .*: install one of these, "
        r"or `pip uninstall megatron-mimo-colocated` to get the stock megatron\.core\.\S+ back",
        import_error(with_wheel, name, PYTHONPATH=path),
    )


@pytest.mark.parametrize("name", NAMES)
def test_missing_megatron_core(with_wheel: ThrowAwayVenv, name: str) -> None:
    assert re.fullmatch(
        rf"ModuleNotFoundError: {name} needs megatron-core, which is not installed in .*: run "
        r"`pip install megatron-mimo-colocated` without --no-deps, or `pip install megatron-core`",
        import_error(with_wheel, name),
    )


def test_missing_megatron_core_beside_a_namespace_of_that_name(
    with_wheel: ThrowAwayVenv, tmp_path: Path
) -> None:
    """An editable install has a folder megatron/core of its own on ``sys.path``."""
    (tmp_path / "megatron" / "core").mkdir(parents=True)
    message = import_error(with_wheel, NAMES[0], PYTHONPATH=str(tmp_path))
    assert "needs megatron-core, which is not installed" in message


@pytest.mark.parametrize("name", NAMES)
def test_missing_torch(with_wheel: ThrowAwayVenv, tmp_path: Path, name: str) -> None:
    path = fake_megatron(tmp_path, package_info="0.16.1", metadata=None)
    (tmp_path / "megatron" / "core" / "__init__.py").write_text("import torch\n")
    message = import_error(with_wheel, name, PYTHONPATH=path)
    assert re.match(rf"ModuleNotFoundError: {name} needs torch, which is not installed", message)


def test_others_who_probe_for_a_missing_package_get_pythons_own_answer(
    with_wheel: ThrowAwayVenv,
) -> None:
    probe = "import importlib.util as u; print(u.find_spec('torch'), u.find_spec('megatron'))"
    assert with_wheel.run("-c", probe).stdout.split() == ["None", "None"]
    assert import_error(with_wheel, "torch") == "ModuleNotFoundError: No module named 'torch'"


def test_a_damaged_install_is_said_at_import_and_not_at_start_up(tmp_path: Path) -> None:
    environment = ThrowAwayVenv(tmp_path / "venv")
    environment.install(str(REPO))
    (environment.site / "mimo_colocated" / "_overlay" / "core" / "hyper_comm_grid.py").unlink()
    assert environment.run("-c", "").stderr == ""
    path = fake_megatron(tmp_path, package_info="0.16.1", metadata=None)
    message = import_error(environment, NAMES[1], PYTHONPATH=path)
    assert message.startswith(
        "ImportError: megatron-mimo-colocated is installed without its modules"
    )


@pytest.mark.parametrize(
    ("version", "supported"),
    [
        ("0.16.1", True),
        ("0.16.1+local", True),
        ("0.19.0", True),
        ("0.19.2", True),
        ("0.19", True),
        ("0.16.0", False),
        ("0.16.2", False),
        ("0.18.9", False),
        ("0.20.0", False),
        ("1.19.0", False),
        ("unknown", False),
    ],
)
def test_supported_versions(version: str, supported: bool) -> None:
    assert _startup.is_supported(version) is supported
