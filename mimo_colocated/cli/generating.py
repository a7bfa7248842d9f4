# SPDX-License-Identifier: Apache-2.0
"""``mimo generate``: what a model answers to a question about images, sounds, or neither."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mimo_colocated.cli import models
from mimo_colocated.cli.options import CommandOptions
from mimo_colocated.cli.ready_models import checked_model, one_sentence, ready_model
from mimo_colocated.launch.errors import JobError

if TYPE_CHECKING:
    from megatron.core.models.mimo.data.batches import ItemRows
    from megatron.core.models.mimo.data.conversation import Conversation, Part

_DRAWS = ("top_k", "top_p", "seed")
_LONGEST = 2**31 - 1  # tokens, where a configuration names no bound


def check_first(options: CommandOptions) -> None:
    """Refuse what can be refused before ranks start.

    Raises:
        JobError: the model, the layouts, what is shown or the question.
    """
    with one_sentence():
        Question(options, checked_model(options).folder)


class Question:
    """One question, as samples and as the source of their images or sounds.

    Args:
        options: of the command.
        folder: of the model.

    Attributes:
        numbers: of the only sample.
        text: encodes for the model.

    Raises:
        JobError: options that say nothing, or a question that the model cannot be asked.
        SampleError: an image or a sound cannot be read, or has no place in the model.
        TemplateError: the folder cannot write questions.
    """

    def __init__(self, options: CommandOptions, folder: Path) -> None:
        from megatron.core.models.mimo.data.conversation import (
            Conversation,
            Turn,
            text,
        )
        from megatron.core.models.mimo.data.encoding import ChatEncoder
        from mimo_colocated.train.data import question

        more = options.more
        _check_draws(options)
        described = models.described(folder)
        shown = list(_shown(options, described, folder))
        asked = Conversation((Turn("user", (*shown, text(more["question"]))),))
        config, places = described.language.config, more["max_new_tokens"]
        longest = getattr(config, "max_position_embeddings", None) or _LONGEST
        self.text = ChatEncoder(folder, _LONGEST)
        made = question(self.text, asked, places)
        count = len(made.input_ids)
        if count > longest:
            raise JobError(
                f"the question has {count - places} tokens and the answer may have {places}, "
                f"together more than the {longest} of the model; ask for less with "
                "--max-new-tokens, or show fewer images or sounds"
            )
        self._asked, self._made = [asked], [made]
        self.numbers = np.zeros(1, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._asked)

    def __getitem__(self, number: int) -> Conversation:
        return self._asked[number]

    def fingerprint(self) -> str:
        """Return the question: nothing of it is kept."""
        return repr(self._asked)

    def lengths(self, samples: np.ndarray) -> np.ndarray:
        """Return the tokens of samples, int64 ``(n,)``."""
        return np.array([len(self._made[sample].input_ids) for sample in samples.tolist()])

    def items(self, samples: np.ndarray) -> ItemRows:
        """Return the rows of its images or sounds, sample after sample."""
        from megatron.core.models.mimo.data.batches import ItemRows

        rows = [np.asarray(self._made[at].rows, dtype=np.int64) for at in samples.tolist()]
        none = np.empty(0, dtype=np.int64)
        counts = np.array([len(each) for each in rows], dtype=np.int64)
        return ItemRows(np.concatenate([none, *rows]), counts)

    def grids(self, sample: int) -> np.ndarray:
        """Return the grids of what it shows, int32 ``(items, 3)``."""
        return self._made[sample].grids

    def tokens(self, sample: int) -> tuple[np.ndarray, np.ndarray]:
        """Return its tokens, and that none is learned: int32, bool ``(n,)``."""
        return self._made[sample].input_ids, self._made[sample].learned


def _shown(options: CommandOptions, described: Any, folder: Path) -> Iterator[Part]:
    """What is shown or played before the question, looked at; the model takes such."""
    from megatron.core.models.mimo.data import images, sounds
    from megatron.core.models.mimo.data.conversation import FileItem, Part

    flags = models.flag_of(described).values()
    for option, kind, flag, look_at in (
        ("image", "image", "vision", images.look_at),
        ("sound", "audio", "audio", sounds.look_at),
    ):
        items = [FileItem(Path(name).expanduser()) for name in options.more[option]]
        if items and flag not in flags:
            takes = " and ".join({"vision": "images", "audio": "sounds"}[each] for each in flags)
            raise JobError(
                f"--{option} is given, and the model in {folder} takes {takes or 'text alone'}"
            )
        for item in items:
            look_at(item)
            yield Part(kind, "", item)


def _check_draws(options: CommandOptions) -> None:
    for name in _DRAWS:
        if options.more[name] is not None and options.more["temperature"] is None:
            flag = name.replace("_", "-")
            raise JobError(
                f"--{flag} says how tokens are drawn, and without --temperature none is: the "
                "likeliest is taken; give --temperature 1, or leave it out"
            )


def work(options: CommandOptions) -> None:
    """Answer the question, on one rank of all."""
    from megatron.core.models.mimo.data.loader import RankBatches
    from megatron.core.models.mimo.data.stream import BatchSize, SampleStream
    from megatron.core.models.mimo.huggingface.all_ranks import on_all_ranks
    from megatron.core.models.mimo.job.next_tokens import Choice
    from megatron.core.models.mimo.job.trainer import TrainOptions
    from mimo_colocated.train.answers import Answering, ends_of
    from mimo_colocated.train.data import InOrder, side_of
    from mimo_colocated.train.items import readers_of, shared_reads
    from mimo_colocated.train.recipe import DataPart
    from mimo_colocated.train.trainer import RecipeRunner

    more, replicas = options.more, options.language.dp
    with one_sentence(), contextlib.ExitStack() as stack:
        model = on_all_ranks(lambda: ready_model(options), "read the model")
        asked = on_all_ranks(lambda: Question(options, model.folder), "read the question")
        text = asked.text
        built = model.build(options, packed=False)
        runner = RecipeRunner(built, TrainOptions(steps=1, global_batch_size=replicas))
        readers = on_all_ranks(lambda: readers_of(model.folder, stack), "open its processor")
        share = shared_reads(built)
        side = side_of(runner, DataPart([]), text.padding, readers, share, 1)
        # Every replica answers it.
        stream = SampleStream(InOrder([1]), [asked], BatchSize(replicas, 0, 0, 1))
        choice = Choice(
            built.composite.language.config.vocab_size,
            temperature=more["temperature"] or 0.0,
            top_k=more["top_k"] or 0,
            top_p=1.0 if more["top_p"] is None else more["top_p"],
            seed=more["seed"] or 0,
        )
        answering = Answering(
            runner,
            text,
            RankBatches(stream, [asked], side),
            more["max_new_tokens"],
            choice,
            {text.end, *ends_of(model.folder)},
        )
        tokens = answering.answers(0)[0]
        built.destroy()
    models.say(text.tokenizer.decode(tokens, skip_special_tokens=True))
