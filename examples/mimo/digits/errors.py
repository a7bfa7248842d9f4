# SPDX-License-Identifier: Apache-2.0
"""Errors of this job that a user reads: one clear sentence, no traceback."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

INSTALL_HINT = "install what the examples need with: pip install '.[examples]'"
"""Said wherever a package is missing; run from the root of the project."""

_PACKAGES = {
    "torch": "torch",
    "numpy": "numpy",
    "sklearn": "scikit-learn",
    "captcha": "captcha",
    "megatron.core": "megatron-core",
    "matplotlib": "matplotlib",
    "tqdm": "tqdm",
    "rich": "rich",
}


class JobError(Exception):
    """An error whose message is one sentence for the user; shown without a traceback."""


class Stopped(Exception):
    """The job was told to stop and has saved; the message is one sentence that says where."""


def require_packages(packages: dict[str, str] | None = None) -> None:
    """Refuse to start when a package the job imports is not installed.

    Args:
        packages: import name to the name on the package index; the job's own list by default.

    Raises:
        JobError: naming every missing package at once, and how to install them.
    """
    wanted = _PACKAGES if packages is None else packages
    missing = [pip_name for name, pip_name in wanted.items() if not _is_installed(name)]
    if missing:
        noun = "package is" if len(missing) == 1 else "packages are"
        raise JobError(f"the {noun} missing: {', '.join(missing)}; {INSTALL_HINT}")


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # a parent package of a dotted name is missing
        return False


@contextlib.contextmanager
def writing(path: Path, what: str) -> Iterator[None]:
    """Turn a failed write below into one sentence that names ``path`` and what to do.

    Args:
        path: the file being written.
        what: what it holds, as the user knows it ("the metrics").

    Raises:
        JobError: for a full disk or quota, and for a path that cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise JobError(_sentence(error, path, what)) from error


def _sentence(error: OSError, path: Path, what: str) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"the disk is full: {what} could not be written to {path}; free some space or give "
            "another folder with --out, then run the same command again to resume"
        )
    reason = error.strerror or str(error)
    return (
        f"{what} could not be written to {path} ({reason}); "
        "check the folder's permissions or give another one with --out"
    )


def write_atomically(path: Path, content: bytes, what: str) -> None:
    """Write ``content`` so that ``path`` holds all of it or what it held before.

    Args:
        path: file to write; its folder is made.
        content: the whole file.
        what: what it holds, for the error ("the summary").

    Raises:
        JobError: for a full disk, or a path that cannot be written; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path, what):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def one_sentence(error: BaseException) -> str:
    """The sentence to show for any exception: a :class:`JobError`'s own, else type and message."""
    if isinstance(error, JobError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"the package is missing: {error.name}; {INSTALL_HINT}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _sentence(error, Path(error.filename or "the output folder"), "the output")
    text = " ".join(str(error).split()) or "no message"
    if len(text) > 400:
        text = text[:397] + "..."
    return f"{type(error).__name__}: {text}"
