# SPDX-License-Identifier: Apache-2.0
"""What the ranks of the launch do: measure kind after kind and tell every cell."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch.distributed as dist

from benchmarks.cases import Pair
from benchmarks.kinds import NAMED
from campaigns.launches import Tell


def work(tell: Tell, kinds: list[str], plan: dict[str, Any]) -> None:
    """All kinds, on this rank; a part of the result per cell."""
    warnings.simplefilter("ignore")
    pairs = tuple(Pair.parse(text) for text in plan["layouts"])
    for name in kinds:
        tell.started(name)
        extra = {"results": Path(plan["results"])} if name == "overlap" else {}
        for cell in NAMED[name].load().measure(pairs, plan["quick"], **extra):
            tell.part(name, {**cell, "backend": dist.get_backend()})
        tell.finished(name, {})
