# SPDX-License-Identifier: Apache-2.0
"""Global batches cut for both sides: every sample and every item once, evenly, or refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.core.models.mimo.comm.plan.balance import TokenCost
from megatron.core.models.mimo.comm.plan.token_runs import expand
from megatron.core.models.mimo.data.batches import (
    Cut,
    ItemRows,
    even_loads,
    first_fit,
    padded,
    plan_batch,
)

pytestmark = pytest.mark.once

FAN_IN = [((0, 1), (0,)), ((2, 3), (1,))]
FAN_OUT = [((0,), (0, 1)), ((1,), (2, 3))]
COST = TokenCost(10)


def item_rows(rows: list[np.ndarray]) -> dict[str, ItemRows]:
    counts = np.array([len(own) for own in rows], dtype=np.int64)
    return {"images": ItemRows(np.concatenate([np.empty(0, np.int64), *rows]), counts)}


def cut(replicas: int, micro: int = 1, *, packed: bool = True, sequences: int = 0) -> Cut:
    return Cut(micro, replicas, packed, 4, sequences, 32)


@given(
    st.lists(st.tuples(st.integers(1, 32), st.lists(st.integers(1, 9), max_size=3)),
             min_size=8, max_size=20),
    st.sampled_from([(2, FAN_IN), (4, FAN_OUT)]),
    st.integers(1, 2),
)
def test_every_sample_and_every_item_goes_to_one_place(samples, layout, micro) -> None:
    replicas, groups = layout
    lengths = [length for length, _ in samples]
    rows = [np.array(own, dtype=np.int64) for _, own in samples]
    plans = plan_batch(lengths, item_rows(rows), cut(replicas, micro), {"images": groups}, COST)
    assert len(plans) == micro
    placed = [place for plan in plans for own in plan.samples for place in own]
    assert sorted(placed) == list(range(len(samples)))
    for plan in plans:
        for share in plan.shares["images"]:
            mine = [place for dp in share.languages for place in plan.samples[dp]]
            wanted = [(place, n) for place in mine for n in range(len(rows[place]))]
            found = [tuple(item) for items in share.items for item in items.tolist()]
            assert sorted(found) == sorted(wanted)
            # Rows are numbered as they stand in the text.
            total = sum(int(rows[place][n]) for place, n in wanted)
            held = np.concatenate([expand(runs) for runs in share.held])
            assert sorted(held.tolist()) == list(range(total))
            for items, runs in zip(share.items, share.held, strict=True):
                assert sum(int(rows[p][n]) for p, n in items) == int(runs[:, 1].sum())


def test_items_are_shared_out_by_cost() -> None:
    rows = [np.array([64]), np.array([8, 8]), np.array([8]), np.array([40])]
    (plan,) = plan_batch([80] * 4, item_rows(rows), cut(1), {"images": [((0, 1), (0,))]}, COST)
    (share,) = plan.shares["images"]
    assert [items.tolist() for items in share.items] == [[[0, 0]], [[1, 0], [1, 1], [2, 0], [3, 0]]]
    assert 1.0 < share.after < share.before < 1.4
    assert share.work == COST(np.concatenate(rows)).sum()
    # A cost that only counts rows puts them elsewhere: the linear term decides.
    linear = TokenCost(10**6)
    (plan,) = plan_batch([80] * 4, item_rows(rows), cut(1), {"images": [((0, 1), (0,))]}, linear)
    assert [len(items) for items in plan.shares["images"][0].items] == [1, 4]
    # However little uneven it was: moving costs a loader nothing.
    near = [np.array([n]) for n in (10, 11, 10, 9)]
    (plan,) = plan_batch([80] * 4, item_rows(near), cut(1), {"images": [((0, 1), (0,))]}, linear)
    (share,) = plan.shares["images"]
    assert (share.before, share.after) == (pytest.approx(1.05, rel=1e-4), pytest.approx(1))


def test_packed_samples_are_shared_out_evenly_and_dense_ones_in_order() -> None:
    lengths = [32, 4, 4, 4, 4, 4, 4, 4]
    (packed,) = plan_batch(lengths, {}, cut(2), {}, COST)
    assert packed.samples == ((0,), (1, 2, 3, 4, 5, 6, 7))
    (dense,) = plan_batch(lengths, {}, cut(2, packed=False), {}, COST)
    assert dense.samples == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert even_loads([3, 3, 3], 3) == [[0], [1], [2]]


def test_sequences_are_filled_alike_in_every_layout() -> None:
    lengths = [20, 9, 30, 11, 3, 8]
    whole = padded(lengths, 4)
    assert whole == [20, 12, 32, 12, 4, 8]
    assert first_fit(whole, 4, 32) == [[0, 1], [2], [3, 4, 5], []]
    (alone,) = plan_batch(lengths, {}, cut(1, sequences=4), {}, COST)
    (two,) = plan_batch(lengths, {}, cut(2, sequences=4), {}, COST)
    assert alone.samples == ((0, 1, 2, 3, 4, 5),)
    assert two.samples == ((0, 1, 2), (3, 4, 5))


@pytest.mark.parametrize(
    ("how", "count", "said"),
    [
        (cut(3, packed=False), 8, "8 samples does not divide over 1 microbatches and 3 language"),
        (cut(4, 3), 8, "leaves some of 12 packed sequences empty"),
        (cut(4, sequences=6), 8, "6 sequences does not divide .* use a multiple of 4"),
    ],
)
def test_batches_that_cannot_be_cut_are_refused(how: Cut, count: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        plan_batch([5] * count, {}, how, {}, COST)


@given(
    st.lists(st.integers(1, 20), max_size=60), st.integers(1, 6), st.integers(1, 5)
)
def test_sequences_and_bins_are_those_of_the_plain_rules(lengths, count, step) -> None:
    """What is vectorised or remembered is what looking at every place each time finds."""
    whole = padded(lengths, step)
    assert whole == [step * -(-length // step) for length in lengths]
    room, wanted = [24] * count, [[] for _ in range(count)]
    for sample, length in enumerate(whole):
        place = next((at for at, left in enumerate(room) if left >= length), None)
        if place is None:
            break
        room[place] -= length
        wanted[place].append(sample)
    assert first_fit(whole, count, 24) == wanted
    loads, bins = [0] * count, [[] for _ in range(count)]
    for sample in sorted(range(len(whole)), key=lambda each: (-whole[each], each)):
        place = min(range(count), key=lambda at: (loads[at], at))
        loads[place] += whole[sample]
        bins[place].append(sample)
    assert even_loads(whole, count) == [sorted(own) for own in bins]


@given(st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(1, 9), max_size=3)), min_size=1))
def test_items_of_a_mixture_stand_as_its_samples_do(samples) -> None:
    """Read source by source, they come out sample by sample."""
    parts = []
    for source in {source for source, _ in samples}:
        at = np.array([n for n, (own, _) in enumerate(samples) if own == source])
        rows = [np.array(samples[n][1], dtype=np.int64) for n in at]
        parts.append((at, item_rows(rows)["images"]))
    found = ItemRows.joined(parts, len(samples))
    assert found.rows.tolist() == [row for _, rows in samples for row in rows]
    order = np.arange(len(samples))[::-1]
    numbers, rows = found.of(order)
    wanted = [((n, k), row) for n in order.tolist() for k, row in enumerate(samples[n][1])]
    assert [(tuple(n), r) for n, r in zip(numbers.tolist(), rows.tolist(), strict=True)] == wanted


def test_a_sample_longer_than_a_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="sample of 40 tokens is longer than a sequence of 32"):
        first_fit([8, 40], 2, 32)
