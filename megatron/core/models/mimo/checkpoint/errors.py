# SPDX-License-Identifier: Apache-2.0
"""The error of everything that concerns checkpoints: one sentence, the same on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from megatron.core.models.mimo.training.agreement import Failure, run_together


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message is one sentence for the user."""


def on_rank_0(action: Callable[[], Any], doing: str) -> None:
    """Run ``action`` on rank 0; if it fails, fail on all. All ranks call it, as those below.

    Args:
        action: starts no collective.
        doing: what "rank 0 could not".
    """
    alone(action if dist.get_rank() == 0 else lambda: None, doing)


def alone(action: Callable[[], Any], doing: str, advice: str = "") -> None:
    """Run ``action``, which starts no collective; if it fails on any rank, fail on all."""
    _raise(run_together(action, has_collectives=False), doing, advice)


def together(action: Callable[[], Any], doing: str) -> None:
    """Run ``action``, which starts collectives; if it fails on any rank, fail on all."""
    _raise(run_together(action, has_collectives=True), doing)


def _raise(failure: Failure | None, doing: str, advice: str = "") -> None:
    if failure is not None:
        text = f"rank {failure.rank} could not {doing}: {failure.reason}"
        raise CheckpointError(f"{text}; {advice}" if advice else text)
