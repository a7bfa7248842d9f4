# SPDX-License-Identifier: Apache-2.0
"""Batches of one rank, made ahead of time beside the training, and how long it waited for them."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from megatron.core.models.mimo.comm.plan.balance import TokenCost
from megatron.core.models.mimo.comm.plan.routed_layout import RouteLayout
from megatron.core.models.mimo.comm.plan.routes import RoutePlan, plan_routes
from megatron.core.models.mimo.comm.plan.token_runs import parts_of_items
from megatron.core.models.mimo.data.arrays import (
    LanguageArrays,
    Positions,
    language_arrays,
    places,
)
from megatron.core.models.mimo.data.batches import Cut, ItemShare, MicrobatchPlan, plan_batch
from megatron.core.models.mimo.data.conversation import AnyItem
from megatron.core.models.mimo.data.readers import Inputs, Reader, Share, alone
from megatron.core.models.mimo.data.sources import Source
from megatron.core.models.mimo.data.stream import GlobalBatch, SampleStream

_CLOSING_S = 5.0  # a rank that fails alone closes before those that it shares reads with


@dataclass(frozen=True, eq=False)
class EncoderSide:
    """What a rank has to know of a modality.

    Attributes:
        layout: of the bridge.
        token: that stands for a row.
        replica: DP rank of this rank's encoder replica.
        reader: makes the items' inputs.
        cost: of an item, from its rows.
        share: what ranks that encode the same items have in common is made by one of them.
    """

    layout: RouteLayout
    token: int
    replica: int
    reader: Reader
    cost: TokenCost
    share: Share = alone


@dataclass(frozen=True, eq=False)
class Side:
    """What a rank has to know of itself.

    Attributes:
        rank: its global one.
        replica: DP rank of its language replica.
        cut: of a global batch.
        padding: token that fills samples up.
        positions: of a sample's tokens.
        encoders: modality -> of it.
    """

    rank: int
    replica: int
    cut: Cut
    padding: int
    positions: Positions
    encoders: Mapping[str, EncoderSide]


@dataclass(frozen=True, eq=False)
class Microbatch:
    """What one rank computes on.

    Attributes:
        samples: of its language replica, places in the global batch.
        language: of its language replica.
        items: modality -> inputs of its encoder replica; None without items.
        routes: modality -> its way over the bridge.
    """

    samples: tuple[int, ...]
    language: LanguageArrays
    items: Mapping[str, Inputs | None]
    routes: Mapping[str, RoutePlan]

    def only(self, count: int) -> Microbatch:
        """Return it with the loss of samples below ``count`` of the global batch alone."""
        kept = np.array([place < count for place in self.samples], dtype=np.float32)
        padded, mask = self.language.padded, self.language.loss_mask
        factor = kept[:, None] if padded is None else np.repeat(kept, padded)[None]
        return replace(self, language=replace(self.language, loss_mask=mask * factor))


@dataclass(frozen=True, eq=False)
class RankBatch:
    """A step of one rank.

    Attributes:
        batch: the global batch.
        microbatches: of this rank.
        images: items of the global batch.
        tokens: of the global batch, padding left out.
        rows: of each item of the global batch, int64 ``(images,)``.
        spreads: modality -> work of the encoder replica with most over the mean, in this rank's
            exchange group: with items shared out by number, and as they are.
    """

    batch: GlobalBatch
    microbatches: tuple[Microbatch, ...]
    images: int
    tokens: int
    rows: np.ndarray
    spreads: Mapping[str, tuple[float, float]]

    def only(self, count: int) -> RankBatch:
        """Return it with the loss of its first ``count`` samples alone: the rest fills it up."""
        return replace(
            self, microbatches=tuple(each.only(count) for each in self.microbatches)
        )


class RankBatches:
    """Makes the batches of one rank.

    Args:
        stream: of global batches.
        sources: of the stream's order, for the items; None for one that has none.
        side: which rank.
    """

    def __init__(self, stream: SampleStream, sources: Sequence[Source | None], side: Side) -> None:
        self._stream, self._sources, self._side = stream, list(sources), side
        # Other exchange groups' items are no business of this rank.
        known = side.encoders.items()
        groups = {modality: own.layout.group_of(side.rank) for modality, own in known}
        self._groups = {
            modality: [(group.src_dps.tolist(), group.dest_dps.tolist())]
            for modality, group in groups.items()
        }

    def at(self, position: int) -> RankBatch:
        """Return the batch that begins at a position.

        Raises:
            ReadError: an item cannot be read.
            ValueError: the batch cannot be cut.
        """
        batch, side = self._stream.batch(position), self._side
        items = self._stream.items(batch)
        plans = plan_batch(
            batch.lengths,
            dict.fromkeys(side.encoders, items),
            side.cut,
            self._groups,
            next(iter(side.encoders.values())).cost if side.encoders else TokenCost(),
        )
        return RankBatch(
            batch,
            tuple(self._microbatch(batch, plan) for plan in plans),
            images=len(items.rows),
            tokens=int(batch.lengths.sum()),
            rows=items.rows,
            spreads={
                modality: _spread([plan.shares[modality][0] for plan in plans])
                for modality in side.encoders
            },
        )

    def _of(self, batch: GlobalBatch, place: int) -> tuple[Any, int]:
        """The prepared source of a sample, and its number there."""
        return self._stream.prepared[batch.sources[place]], int(batch.samples[place])

    def _ids(self, batch: GlobalBatch, place: int) -> np.ndarray:
        prepared, sample = self._of(batch, place)
        return prepared.tokens(sample)[0]

    def _microbatch(self, batch: GlobalBatch, plan: MicrobatchPlan) -> Microbatch:
        side = self._side
        own = [self._of(batch, place) for place in plan.samples[side.replica]]
        language = language_arrays(
            [prepared.tokens(sample) for prepared, sample in own],
            [prepared.grids(sample) for prepared, sample in own],
            side.cut,
            side.padding,
            side.positions,
        )
        items: dict[str, Inputs | None] = {}
        routes: dict[str, RoutePlan] = {}
        for modality, encoder in side.encoders.items():
            (share,) = plan.shares[modality]
            items[modality] = self._inputs(batch, encoder, share)
            routes[modality] = self._routes(batch, plan, encoder, share)
        return Microbatch(plan.samples[side.replica], language, items, routes)

    def _inputs(
        self, batch: GlobalBatch, encoder: EncoderSide, share: ItemShare
    ) -> Inputs | None:
        chosen = share.items[share.encoders.index(encoder.replica)].tolist()
        if not chosen:
            return None
        return encoder.share(lambda: encoder.reader.read(self._items(batch, chosen)))

    def _items(self, batch: GlobalBatch, chosen: Sequence[Sequence[int]]) -> list[AnyItem]:
        """The items of (sample, number), each sample's conversation read once."""
        known: dict[int, list[AnyItem]] = {}
        for place, _ in chosen:
            if place not in known:
                prepared, sample = self._of(batch, place)
                source = self._sources[batch.sources[place]]
                assert source is not None, "a source without items has no rows"
                known[place] = source[int(prepared.numbers[sample])].items()
        return [known[place][number] for place, number in chosen]

    def _routes(
        self, batch: GlobalBatch, plan: MicrobatchPlan, encoder: EncoderSide, share: ItemShare
    ) -> RoutePlan:
        cut = self._side.cut
        tokens = [
            places(
                [self._ids(batch, place) for place in plan.samples[replica]],
                encoder.token,
                cut.multiple,
                cut.packed,
            )
            for replica in share.languages
        ]
        held = parts_of_items(share.held, encoder.layout.src_cp_size)
        return plan_routes(encoder.layout, self._side.rank, tokens, held)


def _spread(shares: Sequence[ItemShare]) -> tuple[float, float]:
    """Before and after, over microbatches: in each the others wait for the replica with most."""
    work = sum(share.work for share in shares)
    if not work:
        return 1.0, 1.0
    before = sum(share.before * share.work for share in shares) / work
    return before, sum(share.after * share.work for share in shares) / work


class Ahead:
    """Makes batches beside the training, some steps ahead.

    Args:
        batches: of this rank.
        start: position of the first.
        steps: how many there will be.
        depth: how many are made ahead; 0 makes each when it is asked for.

    Attributes:
        waited_s: seconds that :meth:`next` has waited, in all.
        position: where the next batch begins.
    """

    def __init__(self, batches: RankBatches, start: int, steps: int, depth: int) -> None:
        self._batches, self._depth = batches, depth
        self.position, self.waited_s, self._taken = start, 0.0, 0
        self._made: queue.Queue[RankBatch | BaseException] = queue.Queue(max(depth, 1))
        self._closed = threading.Event()
        if depth:
            self._thread = threading.Thread(target=self._work, args=(start, steps), daemon=True)
            self._thread.start()

    def next(self) -> RankBatch:
        """Return the next batch.

        Raises:
            ReadError: an item cannot be read.
            ValueError: the batch cannot be cut.
        """
        began = time.perf_counter()
        if self._depth:
            made = self._made.get()
            if isinstance(made, BaseException):
                raise made
        else:
            made = self._batches.at(self.position)
        self.waited_s += time.perf_counter() - began
        self._taken += 1
        self.position = made.batch.stop
        return made

    def close(self) -> None:
        """Make no more; ranks that share reads call it after the same step.

        Each of them ends after the batch that any may have been making, so none waits for another.
        """
        self._closed.set()
        deadline = time.monotonic() + _CLOSING_S
        if self._depth:
            while self._thread.is_alive() and time.monotonic() < deadline:
                with self._made.mutex:
                    self._made.queue.clear()
                    self._made.not_full.notify_all()
                self._thread.join(0.05)

    def _work(self, position: int, steps: int) -> None:
        try:
            for number in range(steps):
                if self._closed.is_set() and number > self._taken + self._depth:
                    return
                made = self._batches.at(position)
                position = made.batch.stop
                self._made.put(made)
            raise ValueError(f"more than the {steps} batches were asked for that were announced")
        except BaseException as error:
            self._made.put(error)
