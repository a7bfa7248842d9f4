# SPDX-License-Identifier: Apache-2.0
"""A global batch cut for language replicas and for encoder replicas: pure integers.

>>> first_fit([5, 9, 4, 3, 8], sequences=2, capacity=12)
[[0, 2, 3], [1]]

The last of them did not fit, so the batch ends before it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron.core.models.mimo.comm.plan.balance import (
    EncoderBalance,
    TokenCost,
    heaviest_first,
    plan_balance,
)
from megatron.core.models.mimo.comm.plan.token_runs import Runs, expand, split_items

Groups = Sequence[tuple[Sequence[int], Sequence[int]]]
"""Of each exchange group of a bridge: its encoder replicas and its language replicas, by DP."""


@dataclass(frozen=True)
class Cut:
    """How a global batch is cut.

    Attributes:
        micro_batches: of a step.
        replicas: of the language model.
        packed: the samples of a replica lie end to end; else each has a row.
        multiple: that a sample's length, packed, or a replica's longest is padded to.
        sequences: of a packed global batch that is as many samples as fit; 0 if it is a number of
            samples, which are shared out evenly.
        capacity: tokens of such a sequence.
    """

    micro_batches: int
    replicas: int
    packed: bool
    multiple: int
    sequences: int
    capacity: int

    @property
    def bins(self) -> int:
        """Places for samples: one per microbatch and replica."""
        return self.micro_batches * self.replicas


@dataclass(frozen=True, eq=False)
class ItemRows:
    """Rows of the items of some samples.

    Attributes:
        rows: of each item, sample after sample, int64 ``(items,)``.
        counts: items of each sample, int64 ``(n,)``.
    """

    rows: np.ndarray
    counts: np.ndarray

    @classmethod
    def joined(cls, parts: Sequence[tuple[np.ndarray, ItemRows]], count: int) -> ItemRows:
        """Return those of a whole from those of its parts.

        Args:
            parts: the samples of each part, places in the whole, int64, and their items.
            count: samples of the whole.
        """
        counts = np.zeros(count, dtype=np.int64)
        for at, part in parts:
            counts[at] = part.counts
        starts = np.cumsum(counts) - counts
        rows = np.empty(int(counts.sum()), dtype=np.int64)
        for at, part in parts:
            rows[expand(np.stack([starts[at], part.counts], axis=1))] = part.rows
        return cls(rows, counts)

    def of(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the items of samples, in order, int64 ``(k, 2)``: sample and number; their rows.

        Args:
            samples: int64 ``(m,)``.
        """
        counts = self.counts[samples]
        starts = (np.cumsum(self.counts) - self.counts)[samples]
        places = expand(np.stack([starts, counts], axis=1))
        numbers = np.stack([np.repeat(samples, counts), places - np.repeat(starts, counts)], axis=1)
        return numbers, self.rows[places]


@dataclass(frozen=True, eq=False)
class ItemShare:
    """Which items the encoder replicas of one exchange group encode in a microbatch.

    Attributes:
        encoders: replicas of the encoder, by DP.
        languages: replicas of the language model, by DP.
        items: of each encoder replica, in the order in which it encodes them: int64 ``(n, 2)``,
            sample of the global batch, item of the sample.
        held: rows of the group that each encoder replica makes, a run per item.
        work: of all of its items, by their cost.
        before, after: work of the replica with most over the mean, with items evenly shared out by
            number and as they are shared out; 1 is even.
    """

    encoders: tuple[int, ...]
    languages: tuple[int, ...]
    items: tuple[np.ndarray, ...]
    held: tuple[Runs, ...]
    work: float
    before: float
    after: float


@dataclass(frozen=True, eq=False)
class MicrobatchPlan:
    """Who gets what of a microbatch.

    Attributes:
        samples: of each language replica, in order: places in the global batch.
        shares: modality -> the share of each exchange group.
    """

    samples: tuple[tuple[int, ...], ...]
    shares: Mapping[str, tuple[ItemShare, ...]]


def plan_batch(
    lengths: Sequence[int] | np.ndarray,
    rows: Mapping[str, ItemRows],
    cut: Cut,
    groups: Mapping[str, Groups],
    cost: TokenCost,
) -> list[MicrobatchPlan]:
    """Cut a global batch.

    Args:
        lengths: tokens of each sample.
        rows: modality -> of the samples' items.
        cut: how.
        groups: modality -> the exchange groups of its bridge.
        cost: of an item, from its rows.

    Returns:
        Microbatch by microbatch.

    Raises:
        ValueError: there are fewer samples than places, or they do not divide evenly.
    """
    bins = _shared_out(lengths, cut)
    plans = []
    for number in range(cut.micro_batches):
        samples = tuple(
            tuple(each) for each in bins[number * cut.replicas : (number + 1) * cut.replicas]
        )
        shares = {
            modality: tuple(_share(pair, samples, rows[modality], cost) for pair in pairs)
            for modality, pairs in groups.items()
        }
        plans.append(MicrobatchPlan(samples, shares))
    return plans


def _shared_out(lengths: Sequence[int] | np.ndarray, cut: Cut) -> list[list[int]]:
    """The samples of each place."""
    if cut.sequences % cut.bins:
        raise ValueError(
            f"a global batch of {cut.sequences} sequences does not divide over "
            f"{cut.micro_batches} microbatches and {cut.replicas} language replicas; use a "
            f"multiple of {cut.bins}"
        )
    if not cut.packed:
        if len(lengths) % cut.bins:
            raise ValueError(
                f"a global batch of {len(lengths)} samples does not divide over "
                f"{cut.micro_batches} microbatches and {cut.replicas} language replicas; use a "
                f"multiple of {cut.bins}"
            )
        return [list(each) for each in split_items(len(lengths), cut.bins)]
    if len(lengths) < cut.bins:
        raise ValueError(
            f"a global batch of {len(lengths)} samples leaves some of {cut.bins} packed sequences "
            f"empty ({cut.micro_batches} microbatches, {cut.replicas} language replicas); use at "
            f"least {cut.bins} samples"
        )
    whole = padded(lengths, cut.multiple)
    if not cut.sequences:
        return even_loads(whole, cut.bins)
    found = first_fit(whole, cut.sequences, cut.capacity)
    each = cut.sequences // cut.bins
    return [sum(found[at : at + each], []) for at in range(0, cut.sequences, each)]


def padded(lengths: Sequence[int] | np.ndarray, multiple: int) -> list[int]:
    """Return lengths rounded up to a multiple."""
    return (-(-np.asarray(lengths, dtype=np.int64) // multiple) * multiple).tolist()


def even_loads(loads: Sequence[int], bins: int) -> list[list[int]]:
    """Share out loads, heaviest first to the lightest bin; each bin's are in ascending order.

    >>> even_loads([5, 9, 4, 3, 8], 2)
    [[1, 2, 3], [0, 4]]

    Args:
        loads: of each sample.
        bins: how many; none stays empty if there are so many samples.
    """
    assigned = heaviest_first(np.asarray(loads), bins)
    order = np.argsort(assigned, kind="stable").tolist()
    ends = np.cumsum(np.bincount(assigned, minlength=bins)).tolist()
    return [order[start:stop] for start, stop in zip([0, *ends], ends, strict=False)]


def first_fit(lengths: Sequence[int], sequences: int, capacity: int) -> list[list[int]]:
    """Put samples, in order, each into the first sequence that has room, until one has no room.

    Args:
        lengths: of the samples that come, padding included.
        sequences: of a global batch.
        capacity: tokens of a sequence.

    Returns:
        The samples of each sequence; together the first ones of ``lengths``.

    Raises:
        ValueError: a sample is longer than a sequence.
    """
    room = [capacity] * sequences
    found: list[list[int]] = [[] for _ in range(sequences)]
    # Sequences before this one have no room for a length, and will not get any.
    first: defaultdict[int, int] = defaultdict(int)
    for sample, length in enumerate(lengths):
        if length > capacity:
            raise ValueError(
                f"a sample of {length} tokens is longer than a sequence of {capacity}; skip it "
                "(max_tokens) or use longer sequences"
            )
        place = first[length]
        while place < sequences and room[place] < length:
            place += 1
        first[length] = place
        if place == sequences:
            break
        found[place].append(sample)
        room[place] -= length
    return found


def _share(
    pair: tuple[Sequence[int], Sequence[int]],
    samples: Sequence[Sequence[int]],
    rows: ItemRows,
    cost: TokenCost,
) -> ItemShare:
    """Share the items of one exchange group's samples out to its encoder replicas, by cost."""
    encoders, languages = pair
    own = [sample for dp in languages for sample in samples[dp]]
    numbers, tokens = rows.of(np.array(own, dtype=np.int64))
    homes = [len(each) for each in split_items(len(tokens), len(encoders))]
    plan = plan_balance(tokens, homes, EncoderBalance(threshold=1.0, cost=cost))
    return ItemShare(
        encoders=tuple(encoders),
        languages=tuple(languages),
        items=tuple(numbers[own] for own in plan.assignment),
        held=tuple(plan.held_rows()),
        work=float(cost(tokens).sum()),
        before=plan.before,
        after=plan.after,
    )
