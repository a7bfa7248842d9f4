# SPDX-License-Identifier: Apache-2.0
"""Digests of a checkpoint's files: taken when it is saved, compared before it is loaded.

A flipped byte in a shard loads without an error and trains on. A SHA-256 per file finds it, as it
finds a file that is short or gone. Against malice it does not help: who can write the files can
write the manifest (``safe_pickles.py`` is for that).

Cost: every byte is read once more, when saving out of the page cache. Ranks share the files, so
the time is (bytes / ranks) / rate, where the rate of one core is that of SHA-256, 1 to 2 GB/s
with SHA instructions (``python -m megatron.core.models.mimo.checkpoint.integrity`` prints it), or
that of the disk where it is slower. Where this is too much, sizes alone are recorded and compared.
"""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any

_CHUNK_BYTES = 4 << 20


class DamagedFile(OSError):
    """A file of a checkpoint is missing or not what was saved; the message names it."""


def sha256(path: Path) -> str:
    """Return the hexadecimal digest of a file's bytes, read in pieces of 4 MiB."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
    return digest.hexdigest()


def describe(folder: Path, names: list[str], *, digests: bool = True) -> dict[str, dict[str, Any]]:
    """Name -> {"bytes", "sha256"} of files, as the manifest keeps it.

    Args:
        folder: of the checkpoint.
        names: files in it.
        digests: read the files; without, ``sha256`` is None.
    """
    return {
        name: {
            "bytes": (folder / name).stat().st_size,
            "sha256": sha256(folder / name) if digests else None,
        }
        for name in names
    }


def check(folder: Path, files: dict[str, dict[str, Any]], *, digests: bool = True) -> None:
    """Compare files with what the manifest keeps of them.

    Args:
        folder: of the checkpoint.
        files: what ``describe`` returned when it was saved.
        digests: read the files; without, only their sizes are compared.

    Raises:
        DamagedFile: the first that is missing, of another size or of other content.
    """
    for name, saved in files.items():
        path = folder / name
        if not path.is_file():
            raise DamagedFile(f"{path} is missing")
        size = path.stat().st_size
        if size != saved["bytes"]:
            raise DamagedFile(f"{path} has {size} bytes, {saved['bytes']} were saved")
    for name, saved in files.items():
        if digests and saved["sha256"] is not None and sha256(folder / name) != saved["sha256"]:
            raise DamagedFile(f"{folder / name} is damaged, its bytes are not those saved")


def share(rank: int, world_size: int, sizes: dict[str, int]) -> list[str]:
    """Return the files that ``rank`` reads when all ranks read about as many bytes.

    Largest first, each to the rank that has the least so far; the same on all ranks.

    >>> share(0, 2, {"a": 3, "b": 2, "c": 2}), share(1, 2, {"a": 3, "b": 2, "c": 2})
    (['a'], ['b', 'c'])
    """
    loads, mine = [0] * world_size, []
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        least = loads.index(min(loads))
        # A file without bytes is work, too: it must not all fall to one rank.
        loads[least] += max(sizes[name], 1)
        if least == rank:
            mine.append(name)
    return mine


def measure(size: int = 256 << 20) -> float:
    """Return the bytes per second of SHA-256 on one core."""
    data = memoryview(bytes(_CHUNK_BYTES))
    digest, start = hashlib.sha256(), time.perf_counter()
    for _ in range(size // _CHUNK_BYTES):
        digest.update(data)
    return size / (time.perf_counter() - start)


if __name__ == "__main__":
    print(f"SHA-256: {measure() / 1e9:.2f} GB/s on one core")
