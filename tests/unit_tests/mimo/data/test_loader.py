# SPDX-License-Identifier: Apache-2.0
"""Batches of all ranks of a job, made in one process: who opens what, and that it fits together."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from megatron.core.hyper_comm_grid import GridShape
from megatron.core.models.mimo.comm.plan.balance import TokenCost
from megatron.core.models.mimo.comm.plan.routed_layout import RouteLayout
from megatron.core.models.mimo.data.arrays import count_up
from megatron.core.models.mimo.data.batches import Cut
from megatron.core.models.mimo.data.conversation import Conversation
from megatron.core.models.mimo.data.encoding import ChatEncoder
from megatron.core.models.mimo.data.loader import (
    Ahead,
    EncoderSide,
    Microbatch,
    RankBatch,
    RankBatches,
    Side,
)
from megatron.core.models.mimo.data.order import Order
from megatron.core.models.mimo.data.prepared import Prepared, encode_piece
from megatron.core.models.mimo.data.readers import ImageReader, Inputs, Share
from megatron.core.models.mimo.data.stream import BatchSize, SampleStream
from tests.unit_tests.mimo.data.small import ROWS, SIDE, Listed, image, said, save, save_text

pytestmark = pytest.mark.once

SHOWN = (2, 0, 1, 3, 0, 1, 1, 2, 0, 1)
"""Images of each sample."""
SOURCE = Listed(
    [
        Conversation(
            said([*(image(10 * n + k) for k in range(count)), "is it " * (1 + n % 4)], "red")
        )
        for n, count in enumerate(SHOWN)
    ]
)
_AXES = ("tp", "cp", "dp")
LAYOUTS = {
    "fan-in": (GridShape((2, 4), ("tp", "dp")), GridShape((2, 2, 2), ("tp", "cp", "dp"))),
    "fan-out": (GridShape((4, 2), ("tp", "dp")), GridShape((1, 2, 4), ("tp", "cp", "dp"))),
    "encoder-cp": (GridShape((2, 2, 2), _AXES), GridShape((2, 2, 2), _AXES)),
    "encoder-cp-fan-out": (GridShape((1, 4, 2), _AXES), GridShape((1, 2, 4), _AXES)),
    "alone": (GridShape((1, 1), ("tp", "dp")), GridShape((1, 1, 1), ("tp", "cp", "dp"))),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[ChatEncoder, Prepared]:
    place = tmp_path_factory.mktemp("loader")
    save_text(place / "text")
    encoder = ChatEncoder(place / "text", 200)
    save(place / "made", [encode_piece(SOURCE, encoder.encode, range(len(SOURCE)), True)], "k")
    return encoder, Prepared(place / "made")


class Job:
    """All ranks of a job over one stream."""

    def __init__(self, made: tuple[ChatEncoder, Prepared], layout: str, **how: Any) -> None:
        encoder, prepared = made
        self.images, self.language = LAYOUTS[layout]
        self.token = encoder.tokenizer.convert_tokens_to_ids("<image>")
        self.padding = encoder.padding
        self.packed, self.micro = bool(how.get("packed", True)), int(how.get("micro", 1))
        self.bridge = RouteLayout.from_grids(self.images, self.language)
        order = Order((len(prepared),), (1.0,), 3)
        self.stream = SampleStream(order, [prepared], BatchSize(8, 0, 0, 1))
        self.readers: list[ImageReader] = []
        self.positions: Any = how.get("positions", count_up)
        self.handed: dict[int, list[Inputs]] = {}

    def rank(self, rank: int) -> RankBatches:
        size = {"height": SIDE, "width": SIDE}
        reader = ImageReader(transformers.SiglipImageProcessorPil(size=size), ["pixel_values"])
        reader.opened = []
        self.readers.append(reader)
        own = self.images.coords(rank)["dp"]
        cost, share = TokenCost(100), self.share(rank)
        encoder = EncoderSide(self.bridge, self.token, own, reader, cost, share)
        cut = Cut(self.micro, self.language.dim_size("dp"), self.packed, 8, 0, 0)
        mine = self.language.coords(rank)["dp"]
        return RankBatches(
            self.stream,
            [SOURCE],
            Side(rank, mine, cut, self.padding, self.positions, {"images": encoder}),
        )

    def share(self, rank: int) -> Share:
        """As ``SharedReads``, for ranks that take turns: the first of a replica comes first."""
        dp = self.images.coords(rank)["dp"]
        handed, got = self.handed.setdefault(dp, []), iter(range(99))
        if not self.first(rank):
            return lambda _make: handed[next(got)]
        return lambda make: handed.append(make()) or handed[-1]

    def first(self, rank: int) -> bool:
        """Whether a rank is the first of its encoder replica."""
        place = self.images.coords(rank)
        return not (place["tp"] or place.get("cp"))

    def all(self, position: int) -> list[RankBatch]:
        return [self.rank(rank).at(position) for rank in range(self.language.size)]


def rows_of(found: Microbatch, token: int) -> int:
    return int((found.language.input_ids == token).sum())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("packed", [True, False])
def test_each_image_is_opened_by_one_rank(made, layout: str, packed: bool) -> None:
    job = Job(made, layout, packed=packed)
    ranks = job.all(0)
    opened: Counter[str] = Counter()
    for reader in job.readers:
        assert len(reader.opened) < max(2, ranks[0].images) or layout == "alone"
        opened.update(reader.opened)
    samples = ranks[0].batch.samples.tolist()
    wanted = Counter(item.name for sample in samples for item in SOURCE[sample].items())
    assert opened == wanted
    assert ranks[0].images == wanted.total()
    assert ranks[0].rows.tolist() == [ROWS] * wanted.total()
    assert ranks[0].tokens == int(ranks[0].batch.lengths.sum())
    by_replica: Counter[int] = Counter()  # one rank of a replica opens them
    for rank, reader in enumerate(job.readers):
        by_replica[job.images.coords(rank)["dp"]] += len(reader.opened)
    for rank, found in enumerate(ranks):  # images of one size: their number is the work
        own = [by_replica[dp] for dp in job.bridge.group_of(rank).src_dps.tolist()]
        before, after = found.spreads["images"]
        assert after == pytest.approx(max(own) * len(own) / sum(own) if sum(own) else 1)
        assert before >= after


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("micro", [1, 2])
def test_peers_hold_the_same_and_replicas_all(made, layout: str, micro: int) -> None:
    job = Job(made, layout, micro=micro)
    ranks = job.all(8)
    for number in range(micro):
        by_replica: dict[int, Microbatch] = {}
        for rank, found in enumerate(ranks):
            replica, mine = job.language.coords(rank)["dp"], found.microbatches[number]
            other = by_replica.setdefault(replica, mine)
            assert np.array_equal(other.language.input_ids, mine.language.input_ids)
            assert np.array_equal(other.language.loss_mask, mine.language.loss_mask)
            peers = [r for r in range(len(ranks))
                     if job.images.coords(r)["dp"] == job.images.coords(rank)["dp"]]
            theirs = ranks[peers[0]].microbatches[number].items["images"]
            own = mine.items["images"]
            assert (own is None) is (theirs is None)
            if own is not None and theirs is not None:
                assert np.array_equal(own["pixel_values"], theirs["pixel_values"])
            # A plan holds as many rows as the rank's parts of its images make.
            images = 0 if own is None else len(own["pixel_values"])
            parts = job.bridge.src_cp_size
            assert mine.routes["images"].held == images * ROWS // parts
        asked = sum(rows_of(each, job.token) for each in by_replica.values())
        encoded = sum(
            len(ranks[r].microbatches[number].items["images"]["pixel_values"]) * ROWS
            for r in range(len(ranks))
            if job.first(r) and ranks[r].microbatches[number].items["images"]
        )
        assert asked == encoded
    placed = sorted(
        place
        for rank, found in enumerate(ranks)
        for each in found.microbatches
        for place in each.samples
        if job.language.coords(rank) == {"tp": 0, "cp": 0, "dp": job.language.coords(rank)["dp"]}
    )
    assert placed == list(range(8))


def test_labels_are_the_next_tokens_and_only_answers_are_learned(made) -> None:
    encoder, prepared = made
    for packed in (True, False):
        (found,) = Job(made, "alone", packed=packed).all(0)
        (microbatch,) = found.microbatches
        language = microbatch.language
        starts = np.cumsum([0, *language.padded]) if packed else None
        for number, place in enumerate(microbatch.samples):
            ids, learned = prepared.tokens(int(found.batch.samples[place]))
            row, at = (0, int(starts[number])) if packed else (number, 0)
            count = len(ids)
            assert language.input_ids[row, at : at + count].tolist() == ids.tolist()
            assert language.labels[row, at : at + count - 1].tolist() == ids[1:].tolist()
            assert language.loss_mask[row, at : at + count - 1].tolist() == learned[1:].tolist()
            assert language.loss_mask[row, at + count - 1] == 0, "what comes next is another sample"
            assert language.position_ids[row, at : at + count].tolist() == list(range(count))
        assert language.loss_mask.sum() == sum(
            prepared.tokens(int(sample))[1][1:].sum() for sample in found.batch.samples
        )


@pytest.mark.parametrize("packed", [True, False])
def test_an_odd_tail_is_filled_up_without_a_loss(made, packed: bool) -> None:
    (found,) = Job(made, "alone", packed=packed).all(0)
    whole, tail = found.microbatches[0].language, found.only(3).microbatches[0].language
    _, prepared = made
    kept = found.batch.samples[:3]
    assert tail.loss_mask.sum() == sum(prepared.tokens(int(s))[1][1:].sum() for s in kept)
    assert tail.loss_mask.sum() < whole.loss_mask.sum()
    assert found.only(8).microbatches[0].language.loss_mask.sum() == whole.loss_mask.sum()


@pytest.mark.parametrize("depth", [0, 2])
def test_batches_ahead_are_those_of_their_positions(made, depth: int) -> None:
    batches = Job(made, "alone").rank(0)
    ahead = Ahead(batches, 4, steps=3, depth=depth)
    for position in (4, 12, 20):
        assert ahead.position == position
        found = ahead.next()
        assert found.batch.start == position
        wanted = batches.at(position).microbatches[0].language
        assert np.array_equal(found.microbatches[0].language.input_ids, wanted.input_ids)
    assert ahead.position == 28
    assert ahead.waited_s > 0
    if depth:
        with pytest.raises(ValueError, match="more than the 3 batches"):
            ahead.next()
    ahead.close()


def test_what_fails_beside_fails_here(made, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(made, "alone")
    batches = job.rank(0)
    monkeypatch.setattr(job.stream, "batch", lambda _start: 1 / 0)
    ahead = Ahead(batches, 0, steps=9, depth=1)
    with pytest.raises(ZeroDivisionError):
        ahead.next()
    ahead.close()


def test_ranks_that_share_reads_end_after_the_same_batch(made) -> None:
    """However far each of them had come, so that none waits for what another does not make."""
    job, ends = Job(made, "alone"), []
    for delay in (0.0, 0.3):
        batches = job.rank(0)
        count, make = [0], batches.at

        def at(position: int, count=count, make=make) -> RankBatch:
            count[0] += 1
            return make(position)

        batches.at = at
        ahead = Ahead(batches, 0, steps=50, depth=2)
        ahead.next()
        ahead.next()
        time.sleep(delay)
        ahead.close()
        assert not ahead._thread.is_alive()
        ends.append(count[0])
    assert ends == [5, 5], "two were taken, two wait, and one was being made"


def test_a_run_that_is_closed_early_ends_its_thread(made, tmp_path: Path) -> None:
    ahead = Ahead(Job(made, "alone").rank(0), 0, steps=1000, depth=1)
    ahead.next()
    ahead.close()
    assert not ahead._thread.is_alive()


@pytest.mark.parametrize("packed", [True, False])
def test_positions_with_rows_and_columns_stand_sample_by_sample(made, packed: bool) -> None:
    """Three axes, of each sample by itself, padding included."""
    _, prepared = made

    def three(ids: np.ndarray, grids: np.ndarray) -> np.ndarray:
        return np.arange(len(ids)) * np.array([[1], [10], [100]]) + len(grids)

    (found,) = Job(made, "alone", packed=packed, positions=three).all(0)
    (microbatch,) = found.microbatches
    language = microbatch.language
    assert language.position_ids.shape == (3, *language.input_ids.shape)
    at = 0
    for number, place in enumerate(microbatch.samples):
        sample = int(found.batch.samples[place])
        count, shown = len(prepared.tokens(sample)[0]), len(prepared.grids(sample))
        assert shown == SHOWN[sample]
        row = language.position_ids[:, 0 if packed else number, at : at + count]
        wanted = three(np.zeros(count), prepared.grids(sample))
        assert row.tolist() == wanted.tolist()
        at += int(language.padded[number]) if packed else 0
