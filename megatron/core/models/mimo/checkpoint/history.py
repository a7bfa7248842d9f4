# SPDX-License-Identifier: Apache-2.0
"""The line of checkpoints below a folder: what is on it, what joins it, what leaves it.

====================  ========================================================================
``step_00000100``     a complete checkpoint; those below the folder are the line
``.saving_…``         half of a checkpoint, or one on its way out: the next save removes it
``abandoned/<n>/…``   checkpoints of a run that went back: complete, no longer on the line
====================  ========================================================================

History is a line. A run that goes back to step 100 and saves ends what came after step 100: those
checkpoints move aside before the new one appears, else the next start would take one of them for
the newest. They move oldest first, so that a kill between two moves leaves the newest one what it
was. Nothing is removed before its successor is on the disk under its own name.

One process calls what changes the folder; this module starts no collective.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from megatron.core.models.mimo.checkpoint.errors import CheckpointError
from megatron.core.models.mimo.checkpoint.manifest import FORMAT, MANIFEST, Manifest

ABANDONED = "abandoned"
_NAME = re.compile(r"step_(\d{8,})")
_PARTIAL_PREFIX = ".saving_"
# Room for file headers and metadata on top of the tensors' bytes.
_DISK_MARGIN = 1.05
_DISK_SLACK_BYTES = 4 << 20


class History:
    """Checkpoints below ``root``, and where on their line a run stands.

    Attributes:
        root: the folder.
        keep: how many of the line's newest stay.
        stands_at: the step that the run goes on from, -1 for a run that started anew.
    """

    def __init__(self, root: Path, keep: int) -> None:
        self.root, self.keep, self.stands_at = root, keep, -1

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, ascending."""
        if not self.root.is_dir():
            return []
        names = (_NAME.fullmatch(p.name) for p in self.root.iterdir() if p.is_dir())
        return sorted(int(m.group(1)) for m in names if m)

    def path(self, step: int) -> Path:
        """Return the folder of the checkpoint of ``step``."""
        return self.root / f"step_{step:08d}"

    def partial(self, step: int) -> Path:
        """Return the folder in which the checkpoint of ``step`` is written."""
        return self.root / f"{_PARTIAL_PREFIX}{step:08d}"

    def manifest(self, step: int) -> Manifest:
        """Read the manifest of a complete checkpoint.

        Raises:
            CheckpointError: if it is missing, unreadable or of another format.
        """
        file = self.path(step) / MANIFEST
        try:
            manifest = Manifest.from_json(file.read_text())
            if manifest.step != step:
                raise ValueError(f"its {MANIFEST} is not that of step {step}")
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"checkpoint {self.path(step)} cannot be read ({error}); "
                "remove that folder to use an earlier one"
            ) from error
        if manifest.format != FORMAT:
            raise CheckpointError(
                f"checkpoint {self.path(step)} has format {manifest.format}, "
                f"this version reads format {FORMAT}"
            )
        return manifest

    def begin(self, step: int, tensor_bytes: int) -> None:
        """Make the folder to write the checkpoint of ``step`` in.

        Raises:
            OSError: it cannot be made, or the disk has no room for the checkpoint.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        remove_partial(self.root)
        need = int(tensor_bytes * _DISK_MARGIN) + _DISK_SLACK_BYTES
        free = shutil.disk_usage(self.root).free
        if free < need:
            raise OSError(
                f"{need / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free: make room on that disk"
            )
        self.partial(step).mkdir()

    def publish(self, manifest: Manifest) -> str | None:
        """Put a checkpoint whose other files are written on the line, as its end.

        Returns:
            What was moved aside, in words; None if nothing was.
        """
        partial, final = self.partial(manifest.step), self.path(manifest.step)
        (partial / MANIFEST).write_text(manifest.to_json())
        for file in partial.iterdir():
            fsync(file)
        fsync(partial)
        moved = self._move_aside(self.abandoned_by(manifest.step))
        os.rename(partial, final)
        fsync(self.root)
        return moved

    def abandoned_by(self, step: int) -> list[int]:
        """Return the steps that leave the line when the run saves ``step``, ascending."""
        return [s for s in self.steps() if s > self.stands_at or s >= step]

    def _move_aside(self, steps: list[int]) -> str | None:
        if not steps:
            return None
        shelves = self.root / ABANDONED
        numbers = [int(p.name) for p in shelves.glob("[0-9]*")] if shelves.is_dir() else []
        shelf = shelves / str(1 + max(numbers, default=0))
        shelf.mkdir(parents=True)
        fsync(shelves)
        for step in steps:
            os.rename(self.path(step), shelf / self.path(step).name)
            fsync(shelf)
            fsync(self.root)
        start = f"step {self.stands_at}" if self.stands_at >= 0 else "the start"
        return (
            f"the run went on from {start}: the checkpoints of an earlier one after that, "
            f"{', '.join(map(str, steps))}, are now in {shelf}; nothing removes them but you"
        )

    def rotate(self) -> None:
        """Remove the oldest of the line, but ``keep``."""
        for step in self.steps()[: -self.keep]:
            # Hidden first: a run killed in between leaves no half of a checkpoint under its name.
            old = self.root / f"{_PARTIAL_PREFIX}over_{step:08d}"
            os.rename(self.path(step), old)
            fsync(self.root)
            shutil.rmtree(old, ignore_errors=True)


def remove_partial(root: Path) -> list[str]:
    """Remove what interrupted saves left below ``root``; returns the removed names."""
    removed = []
    for path in sorted(root.glob(f"{_PARTIAL_PREFIX}*")) if root.is_dir() else []:
        shutil.rmtree(path, ignore_errors=True)
        removed.append(path.name)
    return removed


def fsync(path: Path) -> None:
    """Have what is known of a file or folder on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
