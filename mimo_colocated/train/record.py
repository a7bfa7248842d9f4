# SPDX-License-Identifier: Apache-2.0
"""What is left beside a run: the whole recipe, versions, and the state of the code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.core.models.mimo.job.reporter import versions
from mimo_colocated.launch.errors import write_atomically


def write_record(out: Path, recipe: str, more: Mapping[str, Any]) -> None:
    """Write ``recipe.yaml`` and ``run.json`` on rank 0; other ranks write nothing.

    Args:
        out: folder of the run.
        recipe: every field of it, as YAML.
        more: what else ``run.json`` says: layouts, what was skipped.

    Raises:
        JobError: they cannot be written.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    said = {
        "command": sys.argv,
        "ranks": int(os.environ.get("WORLD_SIZE", "1")),
        "versions": versions("transformers"),
        "git": git_state(Path.cwd()),
        **more,
    }
    write_atomically(out / "recipe.yaml", recipe.encode(), "the recipe")
    content = json.dumps(said, indent=2) + "\n"
    write_atomically(out / "run.json", content.encode(), "the record of the run")


def git_state(folder: Path) -> dict[str, Any] | None:
    """Return the commit that a folder is at, and what differs from it; None outside of git.

    Args:
        folder: within a checkout.
    """
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    changed = _git(folder, "status", "--porcelain") or ""
    return {"commit": commit, "changed": changed.splitlines()}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.rstrip()  # lines of a status begin with blanks
