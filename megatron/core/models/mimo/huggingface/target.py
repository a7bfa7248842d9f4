# SPDX-License-Identifier: Apache-2.0
"""Where a folder is written: under a hidden name beside its own, which it gets when it is whole.

====================  ========================================================================
``.NAME.exporting``   half of a folder: the next export to NAME removes it
``.NAME.replaced``    what NAME was, while it is replaced; complete
====================  ========================================================================

One process calls what changes anything; this module starts no collective.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from megatron.core.models.mimo.checkpoint.history import fsync
from megatron.core.models.mimo.huggingface.folder import INDEX, OpenFolder

_LOCK = ".lock"


class TargetError(OSError):
    """A folder cannot be written where it was asked for; the message says what to do."""


class Target:
    """A folder to be.

    Args:
        folder: its path.
        overwrite: whether it may be in the place of a model that is there.
        source: where the model came from: not to be written into, and what of it travels along is
            all that may be replaced beside weights.

    Attributes:
        folder: its path.
        partial: where it is until it is whole.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        overwrite: bool = False,
        source: OpenFolder | None = None,
    ) -> None:
        # The path as it is given may end in "..", or be a link to the folder.
        self.folder = _real(folder)
        self.partial = self.folder.with_name(f".{self.folder.name}.exporting")
        self._old = self.folder.with_name(f".{self.folder.name}.replaced")
        self._overwrite, self._source = overwrite, source
        self._lock: BinaryIO | None = None

    def check(self) -> None:
        """Refuse a place that is taken.

        Raises:
            TargetError: something is there that would be lost, or nothing can be made there.
        """
        if self._old.exists():
            raise TargetError(
                f"{self._old} is what an interrupted export was to replace {self.folder} by; move "
                f"it back to {self.folder}, or remove it"
            )
        for source in map(_real, self._source.paths if self._source else ()):
            if self.folder.is_relative_to(source) or source.is_relative_to(self.folder):
                raise TargetError(
                    f"{self.folder} and the folder that the model came from, {source}, are the "
                    "same or within one another; give a folder beside it"
                )
        check_place(self.folder)
        if not self.folder.exists():
            return
        if not self.folder.is_dir():
            raise TargetError(f"{self.folder} is a file; give a folder that does not exist")
        if not any(self.folder.iterdir()):
            return
        if not self._overwrite:
            raise TargetError(
                f"{self.folder} exists and is not empty; give another folder, or overwrite=True "
                "(--overwrite) to replace it when the new one is whole"
            )
        if not (self.folder / "config.json").is_file():
            raise TargetError(
                f"{self.folder} holds no model (it has no config.json), so it is not replaced; "
                "give another folder"
            )
        replaced = set(self._source.others()) if self._source else set()
        foreign = sorted(set(self._there()) - replaced - {"config.json"})
        if foreign:
            more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
            raise TargetError(
                f"{self.folder} holds what the new model does not replace: {foreign[:3]}{more}; "
                "move it elsewhere, or give another folder"
            )

    def _there(self) -> Iterator[str]:
        """Files of the folder that would be gone with it, but for weights in its top folder."""
        for path in self.folder.rglob("*"):
            weights = path.parent == self.folder and path.suffix == ".safetensors"
            index = path.parent == self.folder and path.name == INDEX
            if not path.is_dir() and not weights and not index:
                yield path.relative_to(self.folder).as_posix()

    def begin(self, size: int) -> None:
        """Make the hidden folder, empty, with room for what is to come.

        Args:
            size: bytes.

        Raises:
            TargetError: the place is taken, by another export too, or there is no room.
            OSError: it cannot be made.
        """
        self.check()
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self.partial.mkdir(exist_ok=True)
        self._lock = (self.partial / _LOCK).open("wb")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            self._lock = None
            raise TargetError(f"another export writes to {self.folder} now; wait for it") from None
        for path in self.partial.iterdir():
            if path.name != _LOCK:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        free = shutil.disk_usage(self.partial).free
        if free < size:
            raise TargetError(
                f"{self.folder} needs {size / 1e6:.1f} MB, {free / 1e6:.1f} MB are free; make "
                "room on that disk"
            )

    def publish(self) -> None:
        """Give the folder its name: all its files are on the disk.

        Raises:
            TargetError: the place is taken by now.
            OSError: it cannot be renamed.
        """
        self.check()
        (self.partial / _LOCK).unlink()
        for folder in {path.parent for path in self.partial.rglob("*")}:
            fsync(folder)
        if self.folder.exists() and any(self.folder.iterdir()):
            os.rename(self.folder, self._old)
        os.rename(self.partial, self.folder)
        fsync(self.folder.parent)
        shutil.rmtree(self._old, ignore_errors=True)
        self._unlock()

    def abandon(self) -> None:
        """Remove what this export wrote; without one under way it does nothing."""
        if self._lock is not None:
            shutil.rmtree(self.partial, ignore_errors=True)
            self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def check_place(folder: Path) -> None:
    """Refuse a folder below a place where nothing can be made.

    Raises:
        TargetError: it is a file, or may not be written by this user.
    """
    above = next(path for path in folder.absolute().parents if os.path.lexists(path))
    if not above.is_dir():
        raise TargetError(f"{folder} cannot be made: {above} is not a folder; give another place")
    if not os.access(above, os.W_OK | os.X_OK):
        raise TargetError(
            f"{folder} cannot be made: you may not write in {above}; give another place"
        )


def _real(path: str | Path) -> Path:
    return Path(os.path.realpath(path))
