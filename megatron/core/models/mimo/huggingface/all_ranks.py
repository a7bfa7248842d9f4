# SPDX-License-Identifier: Apache-2.0
"""What ranks do each for itself, with one outcome on all of them.

A rank that cannot read a file must not leave the others in the collective that follows: it says so
first, and all ranks fail with its sentence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from megatron.core.models.mimo.huggingface.family import UnsupportedModelError
from megatron.core.models.mimo.huggingface.folder import FolderError
from megatron.core.models.mimo.training.agreement import gathered

Result = TypeVar("Result")


def on_all_ranks(action: Callable[[], Result], doing: str) -> Result:
    """Return what ``action`` returns; if it fails on any rank, fail on all, who call it together.

    Args:
        action: starts no collective.
        doing: what "rank 3 could not".

    Raises:
        FolderError: it failed on some ranks; what failed alike on all is raised as it is.
    """
    failed: Exception | None = None
    try:
        result = action()
    except Exception as error:  # of any kind: the others wait
        failed = error
    told = gathered(None if failed is None else _words(failed))
    rank = next((at for at, words in enumerate(told) if words is not None), None)
    if rank is None:
        return result
    if failed is not None and len(set(told)) == 1:
        raise failed
    raise FolderError(f"rank {rank} could not {doing}: {told[rank]}") from failed


def _words(error: Exception) -> str:
    text = " ".join(str(error).split())
    ours = isinstance(error, (FolderError, UnsupportedModelError, OSError))
    return text if ours and text else f"{type(error).__name__}: {text}"
