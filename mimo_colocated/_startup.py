# SPDX-License-Identifier: Apache-2.0
"""Start-up import hook: two Megatron-Core names resolve to this project.

A ``.pth`` file in site-packages imports this module whenever the interpreter starts. So it loads
nothing that ``site`` has not loaded already, imports nothing of Megatron-Core, and does not
raise; what can go wrong is said when one of the two names is imported. No file of
``megatron-core`` is touched: uninstalling this project removes the hook and the stock modules are
back.
"""

import os
import sys

# Half-open ranges of megatron-core versions whose interfaces this project is tested against.
# pyproject.toml asks pip for the same ones; a test compares them.
SUPPORTED = (((0, 16, 1), (0, 16, 2)), ((0, 19, 0), (0, 20, 0)))
SUPPORTED_TEXT = "0.16.1 (Python 3.10 and 3.11) and 0.19.x (Python 3.12 and newer)"

_HERE = os.path.dirname(os.path.abspath(__file__))
_DISTRIBUTION = "megatron-mimo-colocated"

# Name -> path below the folder that holds the project's ``megatron/core`` tree.
_NAMES = {
    "megatron.core.hyper_comm_grid": "hyper_comm_grid.py",
    "megatron.core.models.mimo": os.path.join("models", "mimo", "__init__.py"),
}

# What one of the names cannot do without, and the distribution that brings it.
_NEEDED = {
    "megatron": "megatron-core",
    "megatron.core": "megatron-core",
    "megatron.core.models": "megatron-core",
    "torch": "torch",
}


def _source_root():
    """Folder that holds ``hyper_comm_grid.py``: inside the wheel, else beside this package."""
    for root in (
        os.path.join(_HERE, "_overlay", "core"),
        os.path.join(os.path.dirname(_HERE), "megatron", "core"),
    ):
        if os.path.isfile(os.path.join(root, "hyper_comm_grid.py")):
            return root
    raise ImportError(
        f"{_DISTRIBUTION} is installed without its modules (looked beside {_HERE}): install it "
        f"again, or uninstall it to use the stock ones"
    )


def _missing(distribution, wanted):
    """The error for an absent distribution, found missing while ``wanted`` is imported."""
    return ModuleNotFoundError(
        f"{wanted} needs {distribution}, which is not installed in {sys.prefix}: "
        f"run `pip install {_DISTRIBUTION}` without --no-deps, or `pip install {distribution}`",
        name=wanted,
    )


def _megatron_version(wanted):
    """Version of the megatron-core that is being imported, also while it is half imported.

    ``package_info`` comes first: it belongs to the very files Python has found, which need not
    be those of the installed distribution (a source checkout on ``PYTHONPATH``).
    """
    import importlib
    import importlib.metadata

    try:
        return str(importlib.import_module("megatron.core.package_info").__version__)
    except (ImportError, AttributeError):
        pass
    try:
        return importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        raise _missing("megatron-core", wanted) from None


def is_supported(version):
    """True when ``version`` (a string like "0.19.2") lies in one of the ``SUPPORTED`` ranges."""
    import re

    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", version)
    if match is None:
        return False
    numbers = tuple(int(part or 0) for part in match.groups())
    return any(low <= numbers < high for low, high in SUPPORTED)


def _check_version(wanted):
    version = _megatron_version(wanted)
    if not is_supported(version):
        raise ImportError(
            f"{_DISTRIBUTION} does not support megatron-core {version}; supported are "
            f"{SUPPORTED_TEXT}: install one of these, or `pip uninstall {_DISTRIBUTION}` to get "
            f"the stock {wanted} back",
            name=wanted,
        )


class MimoFinder:
    """First on ``sys.meta_path``: finds exactly the names in ``_NAMES``; all others pass by."""

    @staticmethod
    def find_spec(fullname, path=None, target=None):
        """Return this project's spec for one of the two names, ``None`` for any other.

        Raises:
            ImportError: megatron-core is missing or of a version that is not supported, or this
                project's own files are missing.
        """
        relative = _NAMES.get(fullname)
        if relative is None:
            return None
        _check_version(fullname)
        from importlib.util import spec_from_file_location

        file = os.path.join(_source_root(), relative)
        is_package = os.path.basename(file) == "__init__.py"
        folders = [os.path.dirname(file)] if is_package else None
        return spec_from_file_location(fullname, file, submodule_search_locations=folders)


def _name_under_import():
    """The name of ``_NAMES`` that some import statement up the stack is loading, if any."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "_find_and_load":
            name = frame.f_locals.get("name")
            if name in _NAMES:
                return name
        frame = frame.f_back
    return None


class MissingFinder:
    """Last on ``sys.meta_path``: says what to install when one of our names cannot load.

    Asked only about modules that no other finder found. It speaks up only inside an import of
    one of the two names: anyone else who probes for torch or megatron gets Python's own answer.
    """

    @staticmethod
    def find_spec(fullname, path=None, target=None):
        """Return ``None``.

        Raises:
            ModuleNotFoundError: ``fullname`` is needed by the name that is being imported.
        """
        distribution = _NEEDED.get(fullname)
        if distribution is not None:
            wanted = _name_under_import()
            if wanted is not None:
                raise _missing(distribution, wanted)


def install():
    """Put the finders on ``sys.meta_path``, once."""
    present = {getattr(finder, "__name__", None) for finder in sys.meta_path}
    if "MimoFinder" not in present:
        sys.meta_path.insert(0, MimoFinder)
        sys.meta_path.append(MissingFinder)


install()
