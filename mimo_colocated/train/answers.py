# SPDX-License-Identifier: Apache-2.0
"""Answers of a model in any layout, token by token, and whether they are right."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron.core.models.mimo.data.arrays import LanguageArrays
from megatron.core.models.mimo.data.conversation import Conversation
from megatron.core.models.mimo.data.encoding import ChatEncoder
from megatron.core.models.mimo.data.loader import Microbatch, RankBatches
from megatron.core.models.mimo.huggingface.all_ranks import on_all_ranks
from megatron.core.models.mimo.job.key_value_cache import KeyValueCache, can_cache
from megatron.core.models.mimo.job.next_tokens import Choice
from megatron.core.models.mimo.training.agreement import gathered
from mimo_colocated import phases
from mimo_colocated.launch.errors import JobError
from mimo_colocated.train.data import Opened
from mimo_colocated.train.trainer import RecipeRunner


@dataclass(frozen=True)
class Answer:
    """What the model said.

    Attributes:
        question: the last thing that was said to it.
        wanted: the answer of the data.
        said: its own.
    """

    question: str
    wanted: str
    said: str

    @property
    def right(self) -> bool:
        """Whether it is the data's, blanks at the ends aside."""
        return self.said.strip() == self.wanted.strip()


class Answering:
    """Answers questions token by token, all ranks together; logits stay cut.

    Args:
        runner: of the model.
        encoder: of its text.
        batches: of questions with places for answers.
        places: of each answer.
        choice: how tokens are chosen; each draw is named by the question's place in the data and
            the token's in the answer.
        ends: tokens that end an answer.
    """

    def __init__(
        self,
        runner: RecipeRunner,
        encoder: ChatEncoder,
        batches: RankBatches,
        places: int,
        choice: Choice,
        ends: Collection[int],
    ) -> None:
        self._runner, self._encoder, self._batches = runner, encoder, batches
        self._places, self._choice, self._ends = places, choice, sorted(ends)
        built: Any = runner.built
        # One that the model says stands for no row, and must not be taken for one.
        self._stand_ins = [each.token_id for each in built.composite.encoders]

    @torch.no_grad()
    def answers(self, start: int) -> list[list[int]]:
        """Return the tokens that the model answers to a batch's questions, on every rank.

        Args:
            start: position of the batch.

        Raises:
            JobError: a logit is not a number.
        """
        self._runner.model.eval()
        batch = self._batches.at(start)
        (microbatch,) = batch.microbatches
        phases.at_step(start, "evaluation batch")
        said = self._said(microbatch, start)
        own = dict(zip(microbatch.samples, said, strict=True))
        everywhere = gathered(own, self._runner.groups.dp)
        found = {place: tokens for each in everywhere for place, tokens in each.items()}
        return [found[place] for place in range(len(found))]

    def _said(self, microbatch: Microbatch, start: int) -> list[list[int]]:
        """Tokens of this replica's answers, each cut at its end."""
        language, end = microbatch.language, self._ends[0]
        asked = [length - self._places for length in language.lengths]
        said = np.full((len(asked), self._places), end)
        ids, (ends, rows) = language.input_ids.copy(), _rows(language)
        cache, shown = self._cache(*ids.shape), np.empty(0)
        for place in range(self._places):
            names = [(start + sample, place) for sample in microbatch.samples]
            at = [(row, first + n - 1 + place) for (row, first), n in zip(rows, asked, strict=True)]
            if cache is not None and place:
                tokens, positions = torch.from_numpy(shown), [position for _, position in at]
                found = self._runner.further_tokens(cache, tokens, positions, self._choice, names)
            else:
                fed = replace(microbatch, language=replace(language, input_ids=ids))
                inputs = {**self._runner.inputs(fed), "labels": None, "loss_mask": None}
                with contextlib.nullcontext() if cache is None else cache.filled():
                    found = self._runner.next_tokens(inputs, at, self._choice, names, ends)
            next_ids = found.cpu()
            done = np.isin(said[:, :place], self._ends).any(axis=1)
            said[:, place] = np.where(done, end, next_ids.numpy())
            shown = np.where(
                np.isin(said[:, place], self._stand_ins), self._encoder.padding, said[:, place]
            )
            for number, (row, first) in enumerate(rows):
                ids[row, first + asked[number] + place] = shown[number]
            all_done = np.isin(said[:, : place + 1], self._ends).any(axis=1).all()
            if self._all_done(bool(all_done), bool((next_ids < 0).any())):
                break
        return [_until(tokens.tolist(), self._ends) for tokens in said]

    def _cache(self, samples: int, length: int) -> KeyValueCache | None:
        """What keeps keys and values of so many samples, where the layout and the model let it."""
        built = self._runner.built
        return KeyValueCache(built, samples, length) if can_cache(built) else None

    def _all_done(self, own: bool, broken: bool) -> bool:
        """Whether all answers of all replicas have ended."""
        left = torch.tensor([not own, broken], dtype=torch.int, device=self._runner.device)
        dist.all_reduce(left)
        unfinished, not_numbers = left.tolist()
        if not_numbers:
            raise JobError(
                "the model's logits are not numbers (nan), so it says nothing; use the checkpoint "
                "of an earlier step, or a dtype with more range"
            )
        return not unfinished


def _rows(language: LanguageArrays) -> tuple[list[int], list[tuple[int, int]]]:
    """Where packed samples end, with a 0 before; row and first place of each sample."""
    if language.padded is None:
        return [], [(number, 0) for number in range(len(language.lengths))]
    ends = np.cumsum([0, *language.padded]).tolist()
    return ends, [(0, start) for start in ends[:-1]]


def _until(tokens: list[int], ends: Collection[int]) -> list[int]:
    return list(itertools.takewhile(lambda token: token not in ends, tokens))


def ends_of(folder: Path) -> list[int]:
    """Return the tokens at which transformers' ``generate`` stops, by a model's folder.

    Args:
        folder: of a Hugging Face model.
    """
    path = folder / "generation_config.json"
    own = json.loads((path if path.is_file() else folder / "config.json").read_text())
    known = own.get("eos_token_id", (own.get("text_config") or {}).get("eos_token_id"))
    return known if isinstance(known, list) else [known] if known is not None else []


def stop_at(folder: Path, end: int) -> None:
    """Let transformers' ``generate`` stop at what ends an answer, besides what it stops at.

    A base model's folder says what ends a text, and its chat template may end answers otherwise.

    Args:
        folder: of a Hugging Face model; its ``generation_config.json`` is written if that lacks it.
        end: the token.
    """
    ends = ends_of(folder)
    if end in ends:
        return
    path = folder / "generation_config.json"
    kept = json.loads(path.read_text()) if path.is_file() else {}
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps({**kept, "eos_token_id": [*ends, end]}, indent=2) + "\n")
    temporary.replace(path)


def wanted(conversation: Conversation) -> tuple[str, str]:
    """Return the last question and the answer of the data."""
    *before, last = conversation.turns
    said = "".join(part.text for part in last.parts)
    asked = [part.text for part in before[-1].parts] if before else []
    return "".join(asked), said


def majority(opened: Opened, answers: Sequence[Answer]) -> float:
    """Return how many of the answers the most frequent one of the training data gets right.

    All ranks call it together; each reads a part of the samples that are trained on.

    Args:
        opened: the training data.
        answers: of the model, for what was wanted.

    Raises:
        FolderError: a rank cannot read its part.
    """
    own = on_all_ranks(lambda: _counted(opened), "read the answers of the training data")
    counts: Counter[str] = Counter()
    for each in gathered(own):
        counts.update(each)
    # Of equally frequent ones the same, however many ranks counted.
    usual = max(counts, key=lambda said: (counts[said], said))
    return sum(each.wanted.strip() == usual for each in answers) / max(len(answers), 1)


def _counted(opened: Opened) -> Counter[str]:
    """How often each answer stands in this rank's part of the training data."""
    rank, world = dist.get_rank(), dist.get_world_size()
    counts: Counter[str] = Counter()
    for source, prepared in zip(opened.sources, opened.prepared, strict=True):
        if source is None:
            continue
        for number in prepared.numbers[rank::world].tolist():
            counts.update(
                "".join(part.text for part in turn.parts).strip()
                for turn in source[number].turns
                if turn.role == "assistant"
            )
    return counts
