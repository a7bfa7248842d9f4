# SPDX-License-Identifier: Apache-2.0
"""Measured tables in docs/bridge.md, each between ``<!-- bench: KIND -->`` and ``<!-- end -->``."""

from __future__ import annotations

import re
from pathlib import Path

from errors import JobError, write_atomically

from benchmarks.kinds import Kind
from benchmarks.report import Cells, machine, text, verdict


def update(path: Path, kind: Kind, cells: Cells, command: str) -> None:
    """Replace a kind's table; a file without a place for it stays as it is.

    Raises:
        JobError: the file cannot be read or written.
    """
    try:
        before = path.read_text()
    except OSError as error:
        raise JobError(f"--docs {path} cannot be read: {error.strerror}") from error
    place = re.compile(rf"(<!-- bench: {kind.name} -->\n).*?(<!-- end -->)", re.DOTALL)
    lines = [*table(kind, cells), "", source(command), ""]
    after = place.sub(lambda found: found[1] + "\n".join(lines) + found[2], before)
    write_atomically(path, after.encode(), "the tables")


def table(kind: Kind, cells: Cells) -> list[str]:
    """Lines of a Markdown table."""
    columns = {k: v for k, v in kind.load().COLUMNS.items() if k != "passed"}
    judged = any(cell["passed"] is not None for cell in cells)
    # A bar ends a field of a Markdown table.
    headings = [heading.replace("|", "/") for heading in columns.values()] + [""] * judged
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for cell in cells:
        fields = [text(cell.get(name)).replace("|", "/") for name in columns]
        lines.append(f"| {' | '.join(fields + [verdict(cell)] * judged)} |")
    return lines


def source(command: str) -> str:
    """The command, and what it ran on."""
    at = machine()
    return (
        f"`{command}`, torch {at['torch']}, {at['cores']} cores, "
        f"load average at the end {at['load_average']}"
    )
