# SPDX-License-Identifier: Apache-2.0
"""Errors that a user reads, one clear sentence without a traceback; files written whole."""

from __future__ import annotations

import contextlib
import difflib
import errno
import importlib.util
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path


class JobError(Exception):
    """An error whose message is one sentence for the user; shown without a traceback."""


class Stopped(Exception):
    """The job was told to stop and has saved; the message is one sentence that says where."""


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Return a question about the nearest name, with a blank behind it; empty if none is near.

    Args:
        name: that is not known.
        known: names that are.
        prefix: of the nearest name, such as where it belongs.

    >>> did_you_mean("paht", ["path", "media"])
    'did you mean path? '
    """
    near = difflib.get_close_matches(name, known, 1)
    return f"did you mean {prefix}{near[0]}? " if near else ""


@dataclass(frozen=True)
class Packages:
    """What a job cannot do without.

    Attributes:
        names: import name -> name on the package index.
        hint: how to install them, said wherever one is missing.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    hint: str = "install it with pip"

    def check(self) -> None:
        """Refuse to start when one is not installed.

        Raises:
            JobError: naming every missing package at once, and how to install them.
        """
        missing = [pip_name for name, pip_name in self.names.items() if not _is_installed(name)]
        if missing:
            noun = "package is" if len(missing) == 1 else "packages are"
            raise JobError(f"the {noun} missing: {', '.join(missing)}; {self.hint}")


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


def one_sentence(error: BaseException, hint: str) -> str:
    """Return the sentence to show for any exception: a :class:`JobError`'s own, else its message.

    Args:
        error: any exception; of others than a :class:`JobError` the type is shown, too.
        hint: how to install packages, if one is missing.
    """
    if isinstance(error, JobError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"the package is missing: {error.name}; {hint}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _sentence(error, Path(error.filename or "the output folder"), "the output")
    text = " ".join(str(error).split()) or "no message"
    if len(text) > 400:
        text = text[:397] + "..."
    return f"{type(error).__name__}: {text}"
