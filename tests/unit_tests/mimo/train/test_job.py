# SPDX-License-Identifier: Apache-2.0
"""What a recipe's ranks decide together: one outcome on all of them, before anything is lost."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron.core.models.mimo.data.conversation import Conversation, SampleError
from mimo_colocated.launch.errors import JobError
from mimo_colocated.train import data
from mimo_colocated.train.answers import Answer, majority
from mimo_colocated.train.recipe import DataPart, SourcePart
from tests.unit_tests.mimo.data.small import Listed, said
from tests.unit_tests.mimo.in_process_ranks import InProcessWorld

NO, YES = (Conversation(said(["is it red"], answer)) for answer in ("no", "yes"))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_most_frequent_answer_is_that_of_samples_that_are_kept(ranks: int) -> None:
    """Every rank reads a part of them and none of what was skipped; a tie has one winner."""
    samples = [YES, SampleError("malformed", "no list"), NO, NO, YES]
    kept: Any = SimpleNamespace(numbers=np.array([0, 2, 3, 4]))
    tokens: Any = SimpleNamespace(numbers=np.arange(7))
    answers = [Answer("", "no", ""), Answer("", "yes", ""), Answer("", "yes ", "")]

    def share(more: list[Any]) -> list[float]:
        whole: Any = SimpleNamespace(numbers=np.arange(len(more)))
        sources = [Listed(samples), None, Listed(more)]
        opened = data.Opened(sources, [kept, tokens, whole], (1.0, 1.0, 1.0))
        return InProcessWorld(ranks).run(lambda rank: majority(opened, answers))

    assert share([NO]) == [pytest.approx(1 / 3)] * ranks
    assert share([YES]) == [pytest.approx(2 / 3)] * ranks
    assert share([YES, NO]) == [pytest.approx(2 / 3)] * ranks


class Local(Listed):
    """A data set whose files each rank has for itself."""

    def __init__(self, rank: int) -> None:
        super().__init__([NO])
        self._rank = rank

    def fingerprint(self) -> str:
        return f"of rank {self._rank}"


@pytest.mark.parametrize("kind", ["chat", "tokens"])
def test_ranks_that_see_other_files_are_one_error_on_all(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any of them encodes: those that think the data is prepared would wait elsewhere."""
    world, raised = InProcessWorld(3), []
    monkeypatch.setattr(data, "open_source", lambda *_: Local(data.dist.get_rank() // 2))
    monkeypatch.setattr(data, "TokenFiles", lambda **_: Local(data.dist.get_rank() // 2))
    encoder: Any = SimpleNamespace(fingerprint=lambda: "one", encode=None)
    parts = [SourcePart(kind, {"path": "a.jsonl"})]

    def open_it(rank: int) -> None:
        text = 7 if kind == "tokens" else encoder
        with pytest.raises(JobError) as caught:
            data.open_data(parts, DataPart(parts), text, tmp_path, 0)
        raised.append(str(caught.value))

    world.run(open_it)
    assert len(raised) == 3
    assert set(raised) == {
        f"rank 2 sees other files than rank 0 for data of kind {kind} at a.jsonl; put the data "
        "where all ranks see the same files"
    }
