# SPDX-License-Identifier: Apache-2.0
"""Greedy answers on held-out data, in any layout, and how many are right."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron.core.models.mimo.data.conversation import Conversation
from megatron.core.models.mimo.data.encoding import ChatEncoder
from megatron.core.models.mimo.data.loader import Microbatch, RankBatches
from megatron.core.models.mimo.huggingface.all_ranks import gathered, on_all_ranks
from mimo_colocated import phases
from mimo_colocated.train.data import Opened
from mimo_colocated.train.trainer import RecipeTrainer


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


class Greedy:
    """Answers held-out questions, all ranks together.

    Args:
        trainer: of the model.
        encoder: of its text.
        batches: of questions with places for answers.
        answer_tokens: places of each.
    """

    def __init__(
        self,
        trainer: RecipeTrainer,
        encoder: ChatEncoder,
        batches: RankBatches,
        answer_tokens: int,
    ) -> None:
        self._trainer, self._encoder = trainer, encoder
        self._batches, self._places = batches, answer_tokens
        built: Any = trainer.built
        part = built.composite.language
        # One that the model says stands for no row, and must not be taken for one.
        self._stand_ins = [each.token_id for each in built.composite.encoders]
        self._vocabulary = part.family.params(part.config)["vocab_size"]

    @torch.no_grad()
    def answers(self, start: int) -> list[list[int]]:
        """Return the tokens that the model answers to a batch's questions, on every rank.

        Args:
            start: position of the batch.
        """
        self._trainer.model.eval()
        batch = self._batches.at(start)
        (microbatch,) = batch.microbatches
        phases.at_step(start, "evaluation batch")
        said = self._said(microbatch)
        everywhere: list[Any] = [None] * self._trainer.groups.dp.size()
        own = dict(zip(microbatch.samples, said, strict=True))
        dist.all_gather_object(everywhere, own, group=self._trainer.groups.dp)
        found = {place: tokens for each in everywhere for place, tokens in each.items()}
        return [found[place] for place in range(len(found))]

    def _said(self, microbatch: Microbatch) -> list[list[int]]:
        """Tokens of this replica's answers, each cut at its end."""
        language, end = microbatch.language, self._encoder.end
        asked = [length - self._places for length in language.lengths]
        said = np.full((len(asked), self._places), end)
        ids = language.input_ids.copy()
        rows = self._rows(microbatch)
        for place in range(self._places):
            logits = self._logits(replace(microbatch, language=replace(language, input_ids=ids)))
            at = torch.tensor([length - 1 + place for length in asked], device=logits.device)
            last = logits[torch.arange(len(asked), device=logits.device), at]
            next_ids = last[:, : len(self._encoder.tokenizer)].argmax(dim=-1).cpu().numpy()
            done = (said[:, :place] == end).any(axis=1)
            said[:, place] = np.where(done, end, next_ids)
            fed = np.where(
                np.isin(said[:, place], self._stand_ins), self._encoder.padding, said[:, place]
            )
            for number, (row, start) in enumerate(rows):
                ids[row, start + asked[number] + place] = fed[number]
            if self._all_done((said[:, : place + 1] == end).any(axis=1).all()):
                break
        return [_until(tokens.tolist(), end) for tokens in said]

    def _rows(self, microbatch: Microbatch) -> list[tuple[int, int]]:
        """Row and first place of each sample in the batch."""
        padded = microbatch.language.padded
        if padded is None:
            return [(number, 0) for number in range(len(microbatch.language.lengths))]
        return [(0, int(start)) for start in np.cumsum([0, *padded])[:-1]]

    def _logits(self, microbatch: Microbatch) -> torch.Tensor:
        inputs = {**self._trainer.inputs(microbatch), "labels": None, "loss_mask": None}
        lengths = microbatch.language.lengths
        shape = (len(lengths), microbatch.language.input_ids.shape[1], self._vocabulary)
        if microbatch.language.padded is not None:
            shape = (len(lengths), max(lengths), self._vocabulary)
        return self._trainer.whole_logits(inputs, lengths, shape)

    def _all_done(self, own: bool) -> bool:
        left = torch.tensor([not own], dtype=torch.int, device=self._trainer.device)
        dist.all_reduce(left)
        return not left.item()


def _until(tokens: Sequence[int], end: int) -> list[int]:
    return list(tokens[: tokens.index(end)]) if end in tokens else list(tokens)


def stop_at(folder: Path, end: int) -> None:
    """Let transformers' ``generate`` stop at what ends an answer, besides what it stops at.

    A base model's folder says what ends a text, and its chat template may end answers otherwise.

    Args:
        folder: of a Hugging Face model; its ``generation_config.json`` is written if that lacks it.
        end: the token.
    """
    path = folder / "generation_config.json"
    own = json.loads((path if path.is_file() else folder / "config.json").read_text())
    known = own.get("eos_token_id", own.get("text_config", {}).get("eos_token_id"))
    ends = known if isinstance(known, list) else [known] if known is not None else []
    if end in ends:
        return
    kept = own if path.is_file() else {}
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
