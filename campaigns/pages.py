# SPDX-License-Identifier: Apache-2.0
"""Files that are replaced whole, and parts of a document between two markers."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Replace a file by ``text``; it holds all of it or what it held before.

    Raises:
        OSError: the disk is full, or the path cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def replace_between(path: Path, start: str, end: str, text: str) -> None:
    """Put ``text`` between two markers of a document.

    Raises:
        OSError: the file cannot be read or written.
        ValueError: a marker is not there exactly once.
    """
    page = path.read_text()
    if page.count(start) != 1 or page.count(end) != 1:
        raise ValueError(f"{path} must hold {start!r} and {end!r}, once each")
    before, _, rest = page.partition(start)
    write_whole(path, f"{before}{start}\n\n{text}\n\n{end}{rest.partition(end)[2]}")
