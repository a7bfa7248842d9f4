# SPDX-License-Identifier: Apache-2.0
"""What stands where: exact epochs, mixtures, and going on from any position."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.core.models.mimo.data.order import Order

pytestmark = pytest.mark.once


def seen(order: Order, start: int, count: int) -> Counter[tuple[int, int]]:
    sources, samples = order.at(start, count)
    return Counter(zip(sources.tolist(), samples.tolist(), strict=True))


@given(st.integers(1, 40), st.integers(0, 5), st.integers(0, 3))
def test_an_epoch_has_every_sample_once(count: int, seed: int, epoch: int) -> None:
    order = Order((count,), (1.0,), seed)
    assert seen(order, epoch * count, count) == Counter({(0, n): 1 for n in range(count)})


def test_a_mixture_holds_what_its_weights_say_in_every_epoch() -> None:
    order = Order((10, 4, 8), (1.0, 3.0, 0.25), seed=3)
    assert order.per_epoch == (10, 12, 2)
    quarters: Counter[tuple[int, int]] = Counter()
    for epoch in range(4):
        found = seen(order, epoch * order.epoch_size, order.epoch_size)
        assert {key: n for key, n in found.items() if key[0] == 0} == {(0, n): 1 for n in range(10)}
        assert {key: n for key, n in found.items() if key[0] == 1} == {(1, n): 3 for n in range(4)}
        quarters += Counter({key: n for key, n in found.items() if key[0] == 2})
    # A fourth in each of four epochs is all of them, none twice.
    assert quarters == Counter({(2, n): 1 for n in range(8)})


def test_orders_differ_by_epoch_and_by_seed() -> None:
    order = Order((50,), (1.0,), 1)
    first, second = order.at(0, 50)[1], order.at(50, 50)[1]
    assert first.tolist() != second.tolist()
    assert first.tolist() != Order((50,), (1.0,), 2).at(0, 50)[1].tolist()
    assert first.tolist() != sorted(first.tolist())
    two = Order((30, 30), (1.0, 1.0), 1)
    assert two.at(0, 60)[0].tolist() != two.at(60, 60)[0].tolist(), "sources meet in other batches"


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(0, 30))
def test_any_cuts_see_what_an_uninterrupted_run_sees(steps: list[int], start: int) -> None:
    order = Order((7, 5), (1.0, 2.0), 4)
    whole = np.stack(order.at(start, sum(steps)))
    pieces, at = [], start
    for count in steps:
        pieces.append(np.stack(order.at(at, count)))
        at += count
    assert np.array_equal(np.concatenate(pieces, axis=1), whole)


@pytest.mark.parametrize(
    ("counts", "weights", "said"),
    [
        ((4, 4), (1.0,), "2 sources and 1 weights"),
        ((), (), "0 sources"),
        ((4,), (0.0,), "source 0 has 4 samples and weight 0.0"),
        ((4,), (0.1,), "an epoch would hold none of it"),
    ],
)
def test_mixtures_that_hold_nothing_are_refused(
    counts: tuple[int, ...], weights: tuple[float, ...], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        Order(counts, weights, 0)


def test_positions_begin_at_zero() -> None:
    with pytest.raises(ValueError, match="positions begin at 0, got 3 from -1"):
        Order((4,), (1.0,), 0).at(-1, 3)
