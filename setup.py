# SPDX-License-Identifier: Apache-2.0
"""The build's entry: what a wheel holds besides ``mimo_colocated``; the rest is in pyproject.toml.

A wheel carries the modules as data of ``mimo_colocated`` (``_overlay/core/…``), never as files
under ``megatron/``, so installing and uninstalling it cannot touch a file of ``megatron-core``. So
it carries the digits example, which recipes name (``_examples/…``). An editable install carries the
start-up ``.pth`` only; the modules are those of the checkout.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.egg_info import egg_info

_STARTUP = Path("mimo_colocated", "megatron_mimo_colocated.pth")
_CORE = Path("megatron", "core")
_MODULES = [_CORE / "hyper_comm_grid.py", *sorted((_CORE / "models" / "mimo").rglob("*.*"))]
# Recipes name it: mimo_colocated/train/programs.py.
_DIGITS = sorted(Path("examples", "mimo", "digits").glob("*.py"))
# Nothing of an earlier build gets into a wheel, and builds at the same time do not meet.
_SCRATCH = tempfile.TemporaryDirectory(prefix="megatron-mimo-colocated-")


class BuildOverlay(build_py):
    """Adds the ``.pth`` to every kind of wheel and the modules to the standard one."""

    def run(self) -> None:
        """Build the package, then copy what comes with it."""
        super().run()
        files = self._overlay()
        if self.editable_mode:
            # The root of the wheel; nothing else of an editable one is taken from a build.
            root = self.get_finalized_command("install").install_lib
            files = {str(Path(root, _STARTUP.name)): str(_STARTUP)}
        for target, source in files.items():
            self.mkpath(str(Path(target).parent))
            self.copy_file(source, target, preserve_mode=False)

    def _overlay(self) -> dict[str, str]:
        """Path in the built wheel -> path in the checkout."""
        modules = [path for path in _MODULES if path.suffix in (".py", ".md")]
        places = {Path("mimo_colocated", "_overlay", *p.parts[1:]): p for p in modules}
        places |= {Path("mimo_colocated", "_examples", path): path for path in _DIGITS}
        places[Path(_STARTUP.name)] = _STARTUP
        return {str(Path(self.build_lib, place)): str(path) for place, path in places.items()}

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """Return the files of a wheel."""
        return [*super().get_outputs(include_bytecode), *self._overlay()]

    def get_output_mapping(self) -> dict[str, str]:
        """Return file of a wheel -> file of the checkout."""
        return {**super().get_output_mapping(), **self._overlay()}

    def get_source_files(self) -> list[str]:
        """Return what an sdist needs, so that no MANIFEST.in says it again."""
        return [*super().get_source_files(), *self._overlay().values(), "pins.env"]


class ScratchEggInfo(egg_info):
    """Leaves the checkout as it is; an sdist alone has its list of files inside it."""

    def initialize_options(self) -> None:
        """Choose the folder, before the command line does."""
        super().initialize_options()
        if "sdist" not in self.distribution.commands:
            self.egg_base = _SCRATCH.name


setup(
    cmdclass={"build_py": BuildOverlay, "egg_info": ScratchEggInfo},
    options={"build": {"build_base": _SCRATCH.name}},
)
