# SPDX-License-Identifier: Apache-2.0
"""Whether all ranks see one folder, found out by writing and reading in it.

All ranks write a checkpoint's files and rank 0 gives them their name. Where nodes have folders of
the same path on disks of their own, half of the files stay behind under a hidden name and nobody
notices before the checkpoint is needed. So rank 0 writes a file with a name that nobody can guess,
every rank looks for it and writes an answer beside it, and rank 0 looks for the answers: a layered
file system may show what is below it and keep what is written to itself.

A folder in which rank 0 cannot write is one to load from: there the checkpoints themselves are
compared.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron.core.models.mimo.checkpoint.errors import CheckpointError
from megatron.core.models.mimo.checkpoint.history import History
from megatron.core.models.mimo.training.agreement import gathered
from mimo_colocated.forensics.who_waits import ranks_in_words

# Network file systems show a new file to other hosts only after their caches' time.
PATIENCE_S = 5.0
_PREFIX = ".probe_"


@dataclass(frozen=True)
class Question:
    """What rank 0 did: ``token`` names the file that it wrote, None if it cannot write."""

    token: str | None
    steps: frozenset[int]


@dataclass(frozen=True)
class Answer:
    """Where a rank looked, and what it cannot do there; empty if all is well."""

    where: str
    problem: str = ""


def check_shared(root: Path, what: str = "a checkpoint") -> None:
    """Make sure that all ranks see ``root`` as one folder; all ranks call it.

    Nothing is left behind, neither files nor folders.

    Args:
        root: the folder.
        what: all ranks write into it.

    Raises:
        CheckpointError: they do not; the same sentence on all ranks.
    """
    probe, rank = _Probe(root, dist.get_rank(), what), dist.get_rank()
    try:
        question = gathered(probe.ask() if rank == 0 else None)[0]
        answers = gathered(probe.answer(question))
        verdict = gathered(probe.verdict(question, answers) if rank == 0 else None)[0]
    finally:
        probe.clean()
    if verdict:
        raise CheckpointError(verdict)


class _Probe:
    def __init__(self, root: Path, rank: int, what: str) -> None:
        self._root, self._rank, self._history = root, rank, History(root, 1)
        self._what = what
        self._written: list[Path] = []
        self._made: list[Path] = []

    def ask(self) -> Question:
        token = secrets.token_hex(8)
        try:
            self._made = [p for p in (self._root, *self._root.parents) if not p.exists()]
            self._root.mkdir(parents=True, exist_ok=True)
            self._write(f"{_PREFIX}{token}")
        except OSError:
            token = None
        return Question(token, frozenset(self._steps()))

    def answer(self, question: Question) -> Answer:
        where = f"{self._root} on {socket.gethostname()}"
        if question.token is None:
            same = _patiently(lambda: self._sees_some_of(question.steps))
            return Answer(where, "" if same else "see the checkpoints of")
        if not _patiently(lambda: f"{_PREFIX}{question.token}" in self._names()):
            return Answer(where, "see")
        try:
            self._write(f"{_PREFIX}{question.token}_{self._rank}")
        except OSError as error:
            return Answer(where, f"write ({error.strerror}) into")
        return Answer(where)

    def _sees_some_of(self, steps: frozenset[int]) -> bool:
        """Some: another job may save and rotate while this one looks."""
        own = set(self._steps())
        return bool(own & steps) or not own | steps

    def verdict(self, question: Question, answers: list[Answer]) -> str:
        """Rank 0's sentence of what is wrong; empty if nothing is."""
        found = {rank: answer for rank, answer in enumerate(answers) if answer.problem}
        if question.token is not None:
            unseen = self._unseen(question.token, sorted(set(range(len(answers))) - set(found)))
            found |= {r: Answer(answers[r].where, "write where others see it into") for r in unseen}
        if not found:
            return ""
        first = min(found)
        same = [rank for rank, answer in found.items() if answer.problem == found[first].problem]
        return (
            f"{ranks_in_words(same)} cannot {found[first].problem} the folder {self._root} of rank "
            f"0 (rank {first} looked at {found[first].where}); all ranks write {self._what} into "
            "one folder: give one on a file system that all nodes share and may write"
        )

    def _unseen(self, token: str, ranks: list[int]) -> list[int]:
        """Which of the ranks that say they wrote an answer rank 0 finds none of."""
        names = {f"{_PREFIX}{token}_{rank}": rank for rank in ranks}
        _patiently(lambda: names.keys() <= self._names())
        return sorted(names[name] for name in names.keys() - self._names())

    def clean(self) -> None:
        """Remove what this rank wrote; rank 0 what all did, so that its folders can go, too."""
        first = self._written[:1] if self._rank == 0 else []
        others = [self._root / name for own in first for name in self._names() if own.name in name]
        for path in self._written + others:
            with contextlib.suppress(OSError):
                path.unlink()
        for path in self._made:
            with contextlib.suppress(OSError):
                path.rmdir()

    def _write(self, name: str) -> None:
        self._written.append(self._root / name)
        (self._root / name).touch(exist_ok=False)

    def _names(self) -> set[str]:
        # Listing a folder makes a network file system look anew; opening a name may not.
        try:
            return set(os.listdir(self._root))
        except OSError:
            return set()

    def _steps(self) -> list[int]:
        try:
            return self._history.steps()
        except OSError:
            return []


def _patiently(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
