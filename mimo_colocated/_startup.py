# SPDX-License-Identifier: Apache-2.0
"""Start-up import hook: two Megatron-Core names resolve to this project.

A ``.pth`` file in site-packages imports this module when the interpreter starts, so it must
stay cheap (standard library only, nothing of Megatron-Core is imported here) and must never
raise. No file of ``megatron-core`` is touched: uninstalling this project removes the hook and
the stock modules are back.
"""

import importlib.abc
import importlib.util
import os
import sys

_HERE = os.path.dirname(os.path.abspath(__file__))

# Name -> path below the folder that holds the project's ``megatron/core`` tree.
_NAMES = {
    "megatron.core.hyper_comm_grid": "hyper_comm_grid.py",
    "megatron.core.models.mimo": os.path.join("models", "mimo", "__init__.py"),
}


def _source_root():
    """Folder that holds ``hyper_comm_grid.py``: inside the wheel, else beside this package."""
    for root in (
        os.path.join(_HERE, "_overlay", "core"),
        os.path.join(os.path.dirname(_HERE), "megatron", "core"),
    ):
        if os.path.isfile(os.path.join(root, "hyper_comm_grid.py")):
            return root
    return None


class MimoFinder(importlib.abc.MetaPathFinder):
    """Meta-path finder for exactly the names in ``_NAMES``; every other import passes by."""

    def find_spec(self, fullname, path=None, target=None):
        """Return this project's spec for one of the two names, ``None`` for any other."""
        relative = _NAMES.get(fullname)
        if relative is None:
            return None
        root = _source_root()
        if root is None:
            return None
        file = os.path.join(root, relative)
        is_package = file.endswith("__init__.py")
        return importlib.util.spec_from_file_location(
            fullname,
            file,
            submodule_search_locations=[os.path.dirname(file)] if is_package else None,
        )


def install():
    """Put the finder first on ``sys.meta_path``, once."""
    if not any(type(f).__name__ == "MimoFinder" for f in sys.meta_path):
        sys.meta_path.insert(0, MimoFinder())


install()
