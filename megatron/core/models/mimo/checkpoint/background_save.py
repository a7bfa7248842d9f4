# SPDX-License-Identifier: Apache-2.0
"""A rank's files of one checkpoint, written while training goes on.

Megatron-Core plans a save and hands out what each rank has to write (``AsyncRequest``). Its own
callers then fork a process, from one that holds the groups' threads, or need a queue in yet
another process. Here a thread of the rank writes: it starts no collective, waits for no other
rank, and reads nothing but copies, so that training may change every weight meanwhile. The ranks
agree on how it went where all of them are between two steps (``CheckpointStore.poll``, ``wait``).

Digests are taken by the same thread, right after a file was written, out of the page cache.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from megatron.core.models.mimo.checkpoint import integrity
from megatron.core.models.mimo.compat import host_copies, save_done, write_file


class ShardWriter:
    """Writes this rank's files; the content is taken when it is built.

    Args:
        request: what Megatron-Core planned.
        folder: of the checkpoint.
        digests: take digests of the files.
        background: copy the content, so that it may change while it is written.
    """

    def __init__(self, request: Any, folder: Path, *, digests: bool, background: bool) -> None:
        self._request, self._folder, self._digests = request, folder, digests
        self._buckets = host_copies(request, copy=background)
        self._results: list[Any] = []
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None
        self.files: dict[str, dict[str, Any]] = {}

    def start(self) -> None:
        """Begin to write in a thread; without this, ``join`` writes."""
        # No daemon: one that is stopped in the middle of a write takes the process down with it.
        self._thread = threading.Thread(target=self._write, name="checkpoint writer", daemon=False)
        self._thread.start()

    def is_done(self) -> bool:
        """Return whether ``join`` returns, or raises, at once."""
        return self._thread is not None and not self._thread.is_alive()

    def failed(self) -> bool:
        """Return whether ``join`` raises at once."""
        return self.is_done() and self._error is not None

    def join(self) -> None:
        """Return when the files are on the disk.

        Raises:
            Exception: what kept a file from being written.
        """
        if self._thread is None:
            self._write()
        else:
            self._thread.join()
        if self._error is not None:
            raise self._error

    def complete(self) -> None:
        """Have rank 0 write what describes the files; all ranks call it when all have joined."""
        save_done(self._request, self._results)

    def _write(self) -> None:
        try:
            for number, bucket in enumerate(self._buckets):
                self._results.append(write_file(self._request, number, bucket))
                names = [bucket[1]]
                self.files |= integrity.describe(self._folder, names, digests=self._digests)
        except Exception as error:  # raised by join
            self._error = error
