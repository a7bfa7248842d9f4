# SPDX-License-Identifier: Apache-2.0
"""Results so far, kept in one JSON file that is always whole, so that a run can be continued.

A result counts as long as nothing it rests on has changed: the copied files, the versions of
Python and its packages, and the mutant itself. Only kills are kept; whatever else happened is
tried again.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.mutants.mutant import Mutant
from tests.mutants.trial import KILLS, Tree, Verdict

_PACKAGES = ("torch", "megatron-core", "pytest")


def versions() -> dict[str, str]:
    """Versions that results depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def digest(tree: Tree) -> str:
    """One hash over everything that is copied and the versions it runs on."""
    total = hashlib.sha256(json.dumps(versions(), sort_keys=True).encode())
    for file in tree.files():
        # The mutants themselves are in the tree; each has a fingerprint of its own.
        name = file.relative_to(tree.root).as_posix()
        if name.startswith("tests/mutants"):
            continue
        content = hashlib.sha256(file.read_bytes()).hexdigest()
        total.update(f"{name} {content}\n".encode())
    return total.hexdigest()[:16]


class Record:
    """What is known about mutants of one state of the tree.

    Args:
        path: the JSON file.
        tree: hash of the tree that results belong to.
        fresh: forget what the file holds.

    Attributes:
        reused: names of mutants whose results come from the file.
    """

    def __init__(self, path: Path, tree: str, *, fresh: bool = False) -> None:
        self.path = path
        self.tree = tree
        self.baseline: dict[str, Any] = {}
        self.results: dict[str, dict[str, Any]] = {}
        self.reused: set[str] = set()
        known = {} if fresh else _read(path)
        if known.get("tree") == tree:
            self.baseline = known["baseline"]
            self.results = {entry["name"]: entry for entry in known["mutants"]}

    def settled(self, mutant: Mutant) -> bool:
        """Whether the file already says that this very mutant is killed."""
        entry = self.results.get(mutant.name, {})
        same = entry.get("fingerprint") == mutant.fingerprint()
        return same and entry.get("status") in KILLS

    def covers(self, tests: list[str]) -> bool:
        """Whether all these tests passed without a mutant."""
        return set(tests) <= set(self.baseline.get("tests", []))

    def add(self, mutant: Mutant, verdict: Verdict) -> None:
        """Keep a mutant's verdict, on the disk as well."""
        self.results[mutant.name] = {
            **{k: v for k, v in asdict(mutant).items() if k not in ("old", "new")},
            "fingerprint": mutant.fingerprint(),
            **asdict(verdict),
        }

    def write(self, mutants: list[Mutant]) -> None:
        """Write the file, whole or not at all; ``mutants`` is the whole catalogue, in order."""
        entries = [self.results[m.name] for m in mutants if m.name in self.results]
        statuses = [entry["status"] for entry in entries]
        summary = {
            "tree": self.tree,
            "versions": versions(),
            "cpus": os.cpu_count(),
            "catalogue": len(mutants),
            "ran": len(entries),
            "killed": sum(status in KILLS for status in statuses),
            "not_killed": [e["name"] for e in entries if e["status"] not in KILLS],
            "seconds": sum(entry["seconds"] for entry in entries),
            "baseline": self.baseline,
            "mutants": entries,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            partial.write_text(json.dumps(summary, indent=1) + "\n")
            os.replace(partial, self.path)
        finally:
            partial.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any]:
    """The file's content; nothing for a file that is missing or not ours."""
    try:
        content = json.loads(path.read_text())
        return content if {"tree", "baseline", "mutants"} <= set(content) else {}
    except (OSError, ValueError, TypeError):
        return {}
