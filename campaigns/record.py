# SPDX-License-Identifier: Apache-2.0
"""Results by case, a line each in a file: a command that is stopped at any moment goes on.

Results count for the code, the settings and the versions that they were found with.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = "results.jsonl"
_PACKAGES = ("torch", "megatron-core", "numpy", "scikit-learn", "pytest")

Result = dict[str, Any]


def versions() -> dict[str, str]:
    """Return the versions that results depend on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def fingerprint(files: Iterable[Path], settings: Any, root: Path = ROOT) -> str:
    """Return a mark that changes with files, settings and versions."""
    digest = hashlib.sha256(json.dumps([settings, versions()], sort_keys=True).encode())
    for path in sorted(files):
        digest.update(str(path.relative_to(root)).encode() + b"\0")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


class Record:
    """Results of one command, in ``folder / "results.jsonl"``.

    Args:
        folder: of the command's results; made.
        mark: of this run; results with another one are forgotten.
        keep: whether an earlier result still counts; ``None`` forgets all of them.

    Attributes:
        results: case -> its result.
        reused: cases whose results are of an earlier run.
    """

    def __init__(
        self, folder: Path, mark: str, keep: Callable[[str, Result], bool] | None
    ) -> None:
        self.folder, self.mark = folder, mark
        self._path = folder / RESULTS
        self.results: dict[str, Result] = {}
        if keep is not None:
            self.results = {n: r for n, r in self._read().items() if keep(n, r)}
        self.reused = frozenset(self.results)
        self._begun = False

    def _read(self) -> dict[str, Result]:
        """What is there with the same mark; a line that a kill has cut short is none."""
        try:
            head, *lines = self._path.read_text().splitlines()
            if json.loads(head) != {"fingerprint": self.mark}:
                return {}
        except (OSError, ValueError):
            return {}
        found: dict[str, Result] = {}
        for line in lines:
            try:
                found |= json.loads(line)
            except ValueError:
                continue
        return found

    def _begin(self) -> None:
        """Write the file anew with what is kept; until then nothing on the disk is changed."""
        self._begun = True
        lines = [{"fingerprint": self.mark}, *({n: r} for n, r in self.results.items())]
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_suffix(".new")
        partial.write_text("".join(json.dumps(line) + "\n" for line in lines))
        os.replace(partial, self._path)

    def add(self, name: str, result: Result) -> None:
        """Take a result; it is on the disk when this returns."""
        if not self._begun:
            self._begin()
        self.results[name] = result
        with self._path.open("a") as file:
            file.write(json.dumps({name: result}) + "\n")
            file.flush()
            os.fsync(file.fileno())
