# SPDX-License-Identifier: Apache-2.0
"""Ranks that save one checkpoint after the other, for a test that kills them."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron.core.models.mimo.checkpoint.store import remove_partial
from tests.unit_tests.mimo.digits_runs import Run, only_rank_0, run


def save_in_a_loop(root: str, journal: str, pair: tuple[str, str], saves: int) -> None:
    """Resume from the newest checkpoint, check its content, then save ``saves`` more.

    Every other one in the background, while the weights change.

    The weights of step ``n`` are a function of ``n``, so that each checkpoint's content is known.
    Rank 0 writes to the journal what it found, and when each save begins and ends.

    Raises:
        ValueError: the newest checkpoint does not hold what was saved at its step.
    """
    note = _Journal(Path(journal))
    with run(pair, seed=6) as one:
        store = one.store(Path(root))
        only_rank_0(lambda: remove_partial(store.root))
        step = max(store.steps(), default=0)
        if step:
            one.load(store, step)
            _check(one, step)
        else:
            one.train(0, 1)  # so that there is optimizer state to save
        note("found", step)
        for number in range(step + 1, step + 1 + saves):
            _fill(one, number)
            note("begin", number)
            one.save(store, number, background=number % 2 == 0)
            _fill(one, 0)  # what is written now, is written from copies
            store.wait()
            note("end", number)


class _Journal:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __call__(self, event: str, step: int) -> None:
        """Add a line, at once and in one piece."""
        if dist.get_rank() == 0:
            line = json.dumps({"event": event, "step": step, "time": time.monotonic()}) + "\n"
            fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.write(fd, line.encode())
            os.close(fd)


def read_journal(path: Path) -> list[dict[str, Any]]:
    """Its lines so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@torch.no_grad()
def _fill(one: Run, step: int) -> None:
    for number, parameter in enumerate(one.built.model.parameters()):
        parameter.fill_(step + number / 1024)


def _check(one: Run, step: int) -> None:
    for number, (name, parameter) in enumerate(one.built.model.named_parameters()):
        if not torch.all(parameter == step + number / 1024):
            raise ValueError(f"checkpoint of step {step}: '{name}' does not hold what was saved")
