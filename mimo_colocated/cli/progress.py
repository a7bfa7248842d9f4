# SPDX-License-Identifier: Apache-2.0
"""Rank 0 tells how far it is with what takes long: a bar in a terminal, else lines."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

EVERY = 30.0
"""Seconds between two lines where no terminal shows a bar; what takes less prints none."""


@contextlib.contextmanager
def bar(what: str, total: int | None = None, unit: str = "B") -> Iterator[Callable[[int], None]]:
    """Yield a function that is told how much more is done; rank 0 shows it, on standard error.

    Args:
        what: is done.
        total: in all, if known.
        unit: of what is told: bytes, or a word for things that are counted.
    """
    import torch.distributed as dist
    from tqdm import tqdm

    first, watched = dist.get_rank() == 0, sys.stderr.isatty()
    scaled = unit == "B"
    unit = unit if scaled else f" {unit}"
    lines = _Lines(what, total, unit) if first and not watched else None
    with tqdm(
        desc=what,
        total=total,
        unit=unit,
        unit_scale=scaled,
        disable=not (first and watched),
        leave=False,
    ) as progress:

        def tell(size: int) -> None:
            progress.update(size)
            if lines is not None:
                lines.update(size)

        yield tell


class _Lines:
    """A line now and then, for those who read a log."""

    def __init__(self, what: str, total: int | None, unit: str) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._done, self._began = 0, time.monotonic()
        self._told = self._began

    def update(self, size: int) -> None:
        from tqdm import tqdm

        self._done += size
        now = time.monotonic()
        if now - self._told < EVERY:
            return
        self._told = now
        said = self._amount(self._done)
        if self._total is not None:
            left = (now - self._began) * (self._total - self._done) / max(self._done, 1)
            said += f" of {self._amount(self._total)}, {tqdm.format_interval(left)} left"
        print(f"{self._what}: {said}", file=sys.stderr, flush=True)

    def _amount(self, count: int) -> str:
        from tqdm import tqdm

        in_bytes = self._unit == "B"
        return tqdm.format_sizeof(count, self._unit) if in_bytes else f"{count}{self._unit}"
