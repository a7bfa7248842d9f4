# SPDX-License-Identifier: Apache-2.0
"""A recipe's data: prepared by all ranks once, then batches of this rank."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron.core.models.mimo.comm.plan.balance import TokenCost
from megatron.core.models.mimo.data.arrays import Positions, count_up
from megatron.core.models.mimo.data.batches import Cut
from megatron.core.models.mimo.data.conversation import Conversation, SampleError
from megatron.core.models.mimo.data.encoding import ChatEncoder, Encoded
from megatron.core.models.mimo.data.loader import (
    Ahead,
    EncoderSide,
    RankBatch,
    RankBatches,
    Side,
)
from megatron.core.models.mimo.data.order import Order
from megatron.core.models.mimo.data.prepared import (
    Prepared,
    encode_piece,
    is_current,
    keep,
    known_key,
    write,
)
from megatron.core.models.mimo.data.readers import Reader, ReadError, Share
from megatron.core.models.mimo.data.sources import TOKENS, Source, SourceError, open_source
from megatron.core.models.mimo.data.stream import BatchSize, SampleStream
from megatron.core.models.mimo.data.token_files import TokenFiles
from megatron.core.models.mimo.huggingface.all_ranks import on_all_ranks
from megatron.core.models.mimo.huggingface.configuration import read_config
from megatron.core.models.mimo.huggingface.positions import multimodal_positions
from megatron.core.models.mimo.job.built_model import LANGUAGE
from megatron.core.models.mimo.job.trainer import Runner
from megatron.core.models.mimo.training.agreement import gathered
from mimo_colocated import phases
from mimo_colocated.cli.progress import bar
from mimo_colocated.launch.errors import JobError
from mimo_colocated.train.checks import SEQUENCE_MULTIPLE
from mimo_colocated.train.recipe import DataPart, SourcePart

Encode = Callable[[Conversation], Encoded]


@dataclass(frozen=True)
class Opened:
    """Data of a recipe that is ready to be read.

    Attributes:
        sources: data sets; None where samples are tokens already.
        prepared: the samples of each that are kept.
        weights: of each.
    """

    sources: list[Source | None]
    prepared: list[Prepared | TokenFiles]
    weights: tuple[float, ...]

    def skipped(self) -> dict[str, int]:
        """Return reason -> skipped samples of all sources."""
        reasons = [each.skipped for each in self.prepared]
        names = sorted({name for each in reasons for name in each})
        return {name: sum(each.get(name, 0) for each in reasons) for name in names}

    def summary(self) -> str:
        """Say how many samples there are, how many are skipped for what, and which is the first."""
        skipped = ", ".join(f"{count} {reason}" for reason, count in self.skipped().items())
        found = f"{sum(map(len, self.prepared))} samples, skipped: {skipped or 'none'}"
        for number, each in enumerate(self.prepared):
            if each.skipped:
                found += f"; of data set {number} {sum(each.skipped.values())}"
                found += f", the first: {each.first_skipped}" if each.first_skipped else ""
        return found

    def kept(self) -> list[dict[str, Any]]:
        """Return of each data set how many samples are kept, and a digest of which and how long.

        Where the order of a run stands is a number of these samples.
        """
        return [_kept(each) for each in self.prepared]


def _kept(prepared: Prepared | TokenFiles) -> dict[str, Any]:
    count = len(prepared)
    state = hashlib.sha256(np.asarray(prepared.numbers, dtype=np.int64).tobytes())
    state.update(np.asarray(prepared.lengths(np.arange(count)), dtype=np.int64).tobytes())
    return {"samples": count, "digest": state.hexdigest()[:16]}


def open_data(
    parts: Sequence[SourcePart],
    data: DataPart,
    text: ChatEncoder | int,
    folder: Path,
    answer_tokens: int,
    retry: bool,
) -> Opened:
    """Open data sets and prepare them, all ranks together.

    Args:
        parts: of the recipe.
        data: of the recipe.
        text: encodes for the model; the size of its vocabulary where all data is tokens already.
        folder: for what is prepared; a subfolder per data set.
        answer_tokens: 0 to train; else samples end before their last answer, with so many places
            for one.
        retry: look again at what was unreadable when it was prepared; not for a run that goes on,
            whose samples are to stay those that it began with.

    Raises:
        FolderError: a data set cannot be opened or prepared.
        JobError: a sample cannot be used, and the recipe skips none.
    """
    opened: list[tuple[Source | None, Prepared | TokenFiles]] = []
    for part in parts:
        if isinstance(text, int):
            opened.append((None, _tokens(part, text)))
        else:
            opened.append(_conversations(part, data, text, folder, answer_tokens, retry))
        skipped = opened[-1][1]
        if skipped.skipped and not data.skip:
            raise JobError(
                f"{skipped.first_skipped}; set data.skip=true to leave out and count such samples"
            )
    sources, prepared = [each[0] for each in opened], [each[1] for each in opened]
    return Opened(sources, prepared, tuple(part.weight for part in parts))


def _tokens(part: SourcePart, vocabulary: int) -> TokenFiles:
    def opening() -> TokenFiles:
        try:
            return TokenFiles(**part.settings, vocabulary=vocabulary)
        except TypeError as error:
            raise SourceError(f"data of kind {TOKENS!r}: {error}") from error

    found = on_all_ranks(opening, f"open {part.kind}")
    _same_everywhere(found.fingerprint, part)
    return found


def _conversations(
    part: SourcePart,
    data: DataPart,
    encoder: ChatEncoder,
    folder: Path,
    answer_tokens: int,
    retry: bool,
) -> tuple[Source, Prepared]:
    encode = _asked(encoder, answer_tokens) if answer_tokens else encoder.encode
    source = _opened_everywhere(part)
    key = _same_everywhere(lambda: _key(source, encoder, data, answer_tokens), part)
    place, look = folder / key, data.look_at_images
    found = on_all_ranks(
        lambda: dist.get_rank() == 0
        and (is_current(place, key, source, encode, look) if retry else known_key(place) == key),
        f"open {place}",
    )
    if not gathered(found)[0]:
        _prepare(source, encode, place, key, look=look)
    return source, on_all_ranks(lambda: Prepared(folder / key), "open prepared data")


def _opened_everywhere(part: SourcePart) -> Source:
    """A data set, opened by rank 0 first: what it finds in large files the others map."""
    found: Source | None = None
    if dist.get_rank() == 0:
        with contextlib.suppress(Exception):  # all ranks meet it below
            found = open_source(part.kind, part.settings)
    gathered(None)
    return on_all_ranks(
        lambda: open_source(part.kind, part.settings) if found is None else found,
        f"open {part.kind}",
    )


def _same_everywhere(say: Callable[[], str], part: SourcePart) -> str:
    """What all ranks say of the files that they see; else they would not go the same way."""
    everywhere = gathered(on_all_ranks(say, f"read {part.kind}"))
    other = next((at for at, said in enumerate(everywhere) if said != everywhere[0]), None)
    if other is not None:
        where = part.settings.get("path")
        at = f" at {where}" if where else ""
        raise JobError(
            f"rank {other} sees other files than rank 0 for data of kind {part.kind}{at}; put the "
            "data where all ranks see the same files"
        )
    return everywhere[0]


def _key(source: Source, encoder: ChatEncoder, data: DataPart, answer_tokens: int) -> str:
    said = [source.fingerprint(), encoder.fingerprint(), data.look_at_images, answer_tokens]
    return hashlib.sha256(repr(said).encode()).hexdigest()[:16]


def _asked(encoder: ChatEncoder, answer_tokens: int) -> Encode:
    """What makes a sample into a question, with places for its answer."""

    def encode(conversation: Conversation) -> Encoded:
        if conversation.turns[-1].role != "assistant":
            raise SampleError("no_supervision", "the last turn is no answer")
        return question(encoder, asked(conversation), answer_tokens)

    return encode


def question(encoder: ChatEncoder, conversation: Conversation, answer_tokens: int) -> Encoded:
    """Return a conversation that an answer follows as tokens, with places for that.

    Args:
        encoder: of the model.
        conversation: ends with what is asked.
        answer_tokens: places.

    Raises:
        SampleError: as :meth:`.ChatEncoder.prompt`.
    """
    made = encoder.prompt(conversation)
    padding = np.full(answer_tokens, encoder.padding, dtype=np.int32)
    ids = np.concatenate([made.input_ids, padding])
    return Encoded(ids, np.zeros(len(ids), dtype=bool), made.rows, made.grids)


def asked(conversation: Conversation) -> Conversation:
    """Return the conversation without its last answer."""
    return Conversation(conversation.turns[:-1])


def _prepare(source: Source, encode: Encode, place: Path, key: str, *, look: bool) -> None:
    """Prepare a source; every rank encodes a part."""
    rank, world, count = dist.get_rank(), dist.get_world_size(), len(source)
    own = range(count * rank // world, count * (rank + 1) // world)
    pieces = [place.with_name(f"{place.name}.rank_{number}") for number in range(world)]
    with bar("preparing samples", count, "samples") as tell:
        told = _told(own, lambda: tell(world))
        on_all_ranks(
            lambda: keep(encode_piece(source, encode, told, look), pieces[rank]), "encode samples"
        )
    on_all_ranks(lambda: write(place, pieces, key) if rank == 0 else None, f"write {place}")
    shutil.rmtree(pieces[rank], ignore_errors=True)


def _told(numbers: Iterable[int], tell: Callable[[], object]) -> Iterator[int]:
    """Yield the numbers, and tell of each when it is done."""
    for number in numbers:
        yield number
        tell()


class InOrder:
    """Held-out samples one after another; an odd tail is filled up with the last.

    Args:
        counts: samples of each source.
    """

    def __init__(self, counts: Sequence[int]) -> None:
        self._counts, self.total = list(counts), sum(counts)

    def at(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the sources and samples at positions, int64 ``(count,)``."""
        positions = np.minimum(np.arange(start, start + count), self.total - 1)
        ends = np.cumsum(self._counts)
        sources = np.searchsorted(ends, positions, side="right")
        return sources, positions - np.concatenate([[0], ends])[sources]


def training_stream(opened: Opened, data: DataPart, seed: int, samples: int) -> SampleStream:
    """Return the endless stream of global batches.

    Args:
        opened: what is trained on.
        data: of the recipe.
        seed: of the order.
        samples: of a global batch.
    """
    try:
        order = Order(tuple(map(len, opened.prepared)), opened.weights, seed)
    except ValueError as error:
        raise JobError(f"data.train, counted from 0: {error}") from error
    counted = 0 if data.sequences else samples
    size = BatchSize(counted, data.sequences, data.capacity, SEQUENCE_MULTIPLE)
    return SampleStream(order, opened.prepared, size)


def held_out_stream(opened: Opened, samples: int) -> SampleStream:
    """Return held-out samples in order, so many at once."""
    order = InOrder([len(each) for each in opened.prepared])
    return SampleStream(order, opened.prepared, BatchSize(samples, 0, 0, 1))


def side_of(
    runner: Runner,
    data: DataPart,
    padding: int,
    readers: dict[str, Reader],
    share: dict[str, Share],
    micro_batches: int,
) -> Side:
    """Return what this rank has to know of itself.

    Args:
        runner: of the model.
        data: of the recipe.
        padding: token.
        readers: modality -> reader of its items.
        share: modality -> how ranks with the same items share what is read.
        micro_batches: of a batch.

    Raises:
        JobError: sequences cannot be cut in this layout.
    """
    built: Any = runner.built
    bridges: Any = runner.model.colocated_comms
    multiple = runner.multiple
    if data.sequences:
        if SEQUENCE_MULTIPLE % multiple:
            raise JobError(
                f"data.sequences pads samples to {SEQUENCE_MULTIPLE} tokens in every layout, and "
                f"this one needs a multiple of {multiple}; use less cp or tp, or data.sequences=0"
            )
        multiple = SEQUENCE_MULTIPLE
    encoders = {
        part.modality: EncoderSide(
            layout=bridges[(part.modality, LANGUAGE)].layout,
            token=part.token_id,
            replica=built.collections[part.modality].dp.rank(),
            reader=readers[part.modality],
            cost=TokenCost(6 * part.config.hidden_size),
            share=share[part.modality],
        )
        for part in built.composite.encoders
    }
    positions = positions_of(built)
    replicas = runner.groups.dp
    cut = Cut(
        micro_batches, replicas.size(), data.packed, multiple, data.sequences, data.capacity
    )
    return Side(dist.get_rank(), replicas.rank(), cut, padding, positions, encoders)


def positions_of(built: Any) -> Positions:
    """Return what counts the positions of a sample's tokens: the text, or images' rows and columns.

    Args:
        built: the model.
    """
    part = built.composite.language
    if part.family.params(part.config)["position_embedding_type"] != "mrope":
        return count_up
    config = read_config(built.source)

    def positions(ids: np.ndarray, grids: np.ndarray) -> np.ndarray:
        tokens = torch.from_numpy(ids)[None]
        shown = torch.from_numpy(np.array(grids, dtype=np.int64)) if len(grids) else None
        return multimodal_positions(config, tokens, shown)[:, 0].numpy()

    return positions


class StepData:
    """The batches of a run, one per step.

    Args:
        batches: of this rank.
        steps: of the run.
        ahead: that are made ahead.

    Attributes:
        position: where the next batch begins; set it before the first step.
        waited_s: of the last step.
    """

    def __init__(self, batches: RankBatches, steps: int, ahead: int) -> None:
        self._batches, self._steps, self._depth = batches, steps, ahead
        self._ahead: Ahead | None = None
        self._last: tuple[int, RankBatch] | None = None
        self.position, self.waited_s = 0, 0.0

    def at(self, step: int) -> RankBatch:
        """Return the batch of a step, from 0; the same one as often as it is asked for.

        Raises:
            JobError: an item cannot be read, or the batch cannot be cut.
        """
        if self._last is not None and self._last[0] == step:
            return self._last[1]
        with phases.during(phases.DATA):
            if self._ahead is None:
                left = self._steps - step
                self._ahead = Ahead(self._batches, self.position, left, self._depth)
            before = self._ahead.waited_s
            try:
                made = self._ahead.next()
            except (ReadError, SourceError, ValueError) as error:
                raise JobError(str(error)) from error
        self.waited_s = self._ahead.waited_s - before
        self.position = made.batch.stop
        self._last = (step, made)
        return made

    @property
    def last(self) -> RankBatch:
        """The batch that was asked for last."""
        assert self._last is not None
        return self._last[1]

    def close(self) -> None:
        """Make no more."""
        if self._ahead is not None:
            self._ahead.close()
