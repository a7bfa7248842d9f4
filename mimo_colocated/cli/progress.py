# SPDX-License-Identifier: Apache-2.0
"""A bar on rank 0 for what takes long."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def bar(what: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Yield a function that is told bytes; rank 0 shows them where somebody looks.

    Args:
        what: is done.
        total: bytes in all, if known.
    """
    import torch.distributed as dist
    from tqdm import tqdm

    shown = dist.get_rank() == 0 and sys.stderr.isatty()
    with tqdm(
        desc=what, total=total, unit="B", unit_scale=True, disable=not shown, leave=False
    ) as progress:
        yield lambda size: None if progress.update(size) else None
