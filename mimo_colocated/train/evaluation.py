# SPDX-License-Identifier: Apache-2.0
"""Held-out loss and exact match of a model in any layout; all replicas share the work."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from megatron.core.models.mimo.data.encoding import ChatEncoder
from megatron.core.models.mimo.data.loader import RankBatches, Side
from megatron.core.models.mimo.job.next_tokens import Choice
from mimo_colocated.cli.progress import bar
from mimo_colocated.train.answers import Answer, Answering, ends_of, wanted
from mimo_colocated.train.data import Opened, held_out_stream, open_data
from mimo_colocated.train.recipe import DataPart, EvaluationPart, Recipe
from mimo_colocated.train.trainer import RecipeRunner


def open_held_out(
    recipe: Recipe, text: ChatEncoder | int, place: Path, *, retry: bool
) -> tuple[Opened, Opened]:
    """Open what the loss is measured on, and the same to be answered, all ranks together.

    Args:
        recipe: that names it.
        text, place, retry: see :func:`.open_data`.

    Raises:
        FolderError, JobError: as :func:`.open_data`.
    """
    parts, data = recipe.data.held_out, recipe.data
    held_out = open_data(parts, data, text, place, 0, retry)
    if isinstance(text, int) or not parts:
        return held_out, held_out
    answer_tokens = recipe.evaluation.answer_tokens
    return held_out, open_data(parts, data, text, place, answer_tokens, retry)


class Evaluation:
    """Evaluates one model; every rank makes one and calls the same methods.

    Args:
        runner: of the model.
        data: of the recipe.
        part: of the recipe.
        text: encodes for the model; None where all data is tokens already.
        side: what this rank has to know of itself, for data in so many microbatches a batch.
        between: called before each batch; it may raise to stop.
        loss_micro_batches: of a batch that the loss is measured on.
    """

    def __init__(
        self,
        runner: RecipeRunner,
        data: DataPart,
        part: EvaluationPart,
        text: ChatEncoder | None,
        side: Callable[[DataPart, int], Side],
        between: Callable[[], None],
        loss_micro_batches: int,
    ) -> None:
        self._runner, self._part, self._text, self._between = runner, part, text, between
        # However many sequences are trained on, held-out samples are counted.
        counted = dataclasses.replace(data, sequences=0)
        self._asking, self._measuring = side(counted, 1), side(counted, loss_micro_batches)

    def measure(
        self, held_out: Opened, questions: Opened
    ) -> tuple[dict[str, Any], list[Answer]]:
        """Return held-out loss, exact match and, if asked for, that without images; the answers.

        The same on all ranks. Where data is tokens already nothing is asked.

        Args:
            held_out: what the loss is measured on.
            questions: the same to be answered.
        """
        found: dict[str, Any] = {"held_out_loss": self._loss(held_out)}
        if self._text is None:
            return found, []
        answers = self._answers(questions)
        found |= {"questions": len(answers), "exact_match": _share(answers)}
        if self._part.without_images:
            self._runner.blank = True
            found["exact_match_without_images"] = _share(self._answers(questions))
            self._runner.blank = False
        return found, answers

    def _batches(self, opened: Opened, side: Side) -> tuple[RankBatches, int]:
        stream = held_out_stream(opened, self._part.batch)
        total = sum(len(each) for each in opened.prepared)
        batches = RankBatches(stream, opened.sources, side)
        return batches, min(self._part.samples or total, total)

    def _starts(self, what: str, count: int, unit: str) -> Iterator[int]:
        """Where batches begin; before each it may be stopped, after each it is told."""
        with bar(what, count, unit) as tell:
            for start in range(0, count, self._part.batch):
                self._between()
                yield start
                tell(min(self._part.batch, count - start))

    def _loss(self, held_out: Opened) -> float:
        """Mean over the counted tokens of whole batches, and of the tail filled up."""
        batches, count = self._batches(held_out, self._measuring)
        sums = torch.zeros(2, dtype=torch.float64)
        for start in self._starts("held-out loss", count, "samples"):
            batch = batches.at(start).only(count - start)
            sums += torch.tensor(self._runner.held_out_loss(batch), dtype=torch.float64)
        return (sums[0] / sums[1].clamp(min=1)).item()

    def _answers(self, questions: Opened) -> list[Answer]:
        assert self._text is not None
        built: Any = self._runner.built
        batches, count = self._batches(questions, self._asking)
        choice = Choice(built.composite.language.config.vocab_size)
        ends = {self._text.end, *ends_of(built.source)}
        places = self._part.answer_tokens
        answering = Answering(self._runner, self._text, batches, places, choice, ends)
        said: list[str] = []
        what = "answers without images" if self._runner.blank else "answers"
        for start in self._starts(what, count, "questions"):
            said += self._text.tokenizer.batch_decode(answering.answers(start))
        asked = (
            wanted(source[number])
            for source, prepared in zip(questions.sources, questions.prepared, strict=True)
            if source is not None
            for number in prepared.numbers.tolist()
        )
        # What is not asked is not read either.
        pairs = itertools.islice(asked, count)
        return [Answer(*pair, text) for pair, text in zip(pairs, said, strict=False)]


def _share(answers: list[Answer]) -> float:
    return sum(each.right for each in answers) / max(len(answers), 1)
