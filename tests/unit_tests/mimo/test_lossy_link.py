# SPDX-License-Identifier: Apache-2.0
"""Packets, what replaces lost ones, and links: against masks and sums written out by hand.

One process. Every comparison is exact, in fp32 and 16 bit: nothing here rounds but ``rescaled``,
whose factor is applied to the same numbers on both sides.
"""

from __future__ import annotations

import itertools
import json
import random

import numpy as np
import pytest
import torch

from megatron.core.models.mimo.lossy.draws import Draws, stream_key
from megatron.core.models.mimo.lossy.link import Link
from megatron.core.models.mimo.lossy.loss_models import (
    Bernoulli,
    ChainState,
    GilbertElliott,
    Transmission,
)
from megatron.core.models.mimo.lossy.packets import (
    PAYLOAD,
    count_packets,
    element_mask,
    elements_per_packet,
    packet_sizes,
)
from megatron.core.models.mimo.lossy.replacements import rescaled, resend, stale, zero
from megatron.core.models.mimo.lossy.statistics import Counts, sum_counts

# Nothing of Megatron-Core is in them.
pytestmark = pytest.mark.once

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
KEY = stream_key(3, "layer", 0)
HALF = GilbertElliott(0.4, 0.4)


def link(model: object, replacement: str = "zero", payload: int = 16, key: int = KEY) -> Link:
    return Link(model, replacement, key, payload)


def message(elements: int = 24, dtype: torch.dtype = torch.float32, start: int = 1) -> torch.Tensor:
    return torch.arange(start, start + elements).to(dtype)


# --- packets -------------------------------------------------------------------------------


def test_elements_per_packet() -> None:
    assert [elements_per_packet(PAYLOAD, size) for size in (8, 4, 2, 1)] == [181, 362, 725, 1450]
    assert elements_per_packet(7, 4) == 1
    with pytest.raises(ValueError, match="packet of 3 bytes holds no element of 4 bytes"):
        elements_per_packet(3, 4)
    for wrong in (0, -1, 1450.0):
        with pytest.raises(ValueError, match="whole number of bytes, 1 or more, got"):
            elements_per_packet(wrong, 4)


def test_every_packet_owns_an_element_and_every_element_is_in_one() -> None:
    for elements in range(60):
        for per_packet in range(1, 20):
            sizes = packet_sizes(elements, per_packet)
            assert len(sizes) == count_packets(elements, per_packet)
            assert sum(sizes) == elements
            assert all(size == per_packet for size in sizes[:-1])
            assert all(1 <= size <= per_packet for size in sizes)
            lost = torch.tensor([i % 3 == 0 for i in range(len(sizes))], dtype=torch.bool)
            by_hand = [i // per_packet % 3 == 0 for i in range(elements)]
            assert element_mask(lost, (elements,), per_packet).tolist() == by_hand


@pytest.mark.parametrize(("dtype", "per_packet"), [(torch.float32, 4), (torch.bfloat16, 8)])
def test_masks_follow_memory_order(dtype: torch.dtype, per_packet: int) -> None:
    assert elements_per_packet(17, dtype.itemsize) == per_packet
    x = torch.zeros(3, 2, 5, dtype=dtype)
    lost = torch.zeros(count_packets(30, per_packet), dtype=torch.bool)
    lost[1] = lost[-1] = True
    mask = element_mask(lost, x.shape, per_packet)
    expected = [*range(per_packet, 2 * per_packet), *range(30 // per_packet * per_packet, 30)]
    assert mask.shape == x.shape
    assert mask.reshape(-1).nonzero().reshape(-1).tolist() == expected
    with pytest.raises(ValueError, match=r"has \d packets of \d elements, got a mask of shape"):
        element_mask(lost[1:], x.shape, per_packet)


# --- replacements on a fixed mask ----------------------------------------------------------

LOST = torch.tensor([[False, True, True], [False, False, True]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_replacements_on_a_fixed_mask(dtype: torch.dtype) -> None:
    x = torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=dtype)
    last = torch.tensor([[9, 8, 7], [6, 5, 4]], dtype=dtype)
    kept = x.clone()
    results = {
        "zero": (zero(x, LOST), [[1, 0, 0], [4, 5, 0]]),
        "stale": (stale(x, LOST, last), [[1, 8, 7], [4, 5, 4]]),
        "stale at first": (stale(x, LOST, None), [[1, 0, 0], [4, 5, 0]]),
        "stale after another shape": (stale(x, LOST, last[:1]), [[1, 0, 0], [4, 5, 0]]),
        "rescaled": (rescaled(x, LOST, 6, 3), [[2, 0, 0], [8, 10, 0]]),
        "nothing arrived": (rescaled(x, LOST | True, 6, 0), [[0, 0, 0], [0, 0, 0]]),
    }
    for name, (found, expected) in results.items():
        assert found.tolist() == expected, name
        assert (found.dtype, found.device) == (dtype, x.device)
        assert found.data_ptr() != x.data_ptr()
    assert torch.equal(x, kept)


def test_rescaled_is_unbiased_over_all_masks_of_a_number() -> None:
    """Integers, and factors 6/k: the mean over all masks is the message up to rounding."""
    x = message(6, torch.float64)
    for count in range(6):
        masks = list(itertools.combinations(range(6), count))
        results = []
        for places in masks:
            lost = torch.zeros(6, dtype=torch.bool)
            lost[list(places)] = True
            results.append(rescaled(x, lost, 6, 6 - count))
        torch.testing.assert_close(torch.stack(results).mean(0), x, rtol=1e-12, atol=0)
    biased = torch.stack([zero(x, torch.arange(6) == i) for i in range(6)]).mean(0)
    assert not torch.allclose(biased, x)  # the control


class Script:
    """A model that loses what it is told, transmission by transmission."""

    mean_loss, may_stay_lost = 0.5, False

    def __init__(self, *transmissions: str) -> None:
        self.transmissions = list(transmissions)

    def start(self, _draws, /):
        return ChainState(False, 0.0)

    def send(self, packets, state, draws, purpose):
        lost = np.array([c == "x" for c in self.transmissions.pop(0)], dtype=bool)
        assert lost.size == packets
        return Transmission(lost, lost, ChainState(bool(lost[-1]), 0.0))


def test_what_is_sent_again_is_counted() -> None:
    model = Script("x.xx.", "x.x", ".x", ".", "..x..", ".")
    carried = link(model, "retransmitted")
    x = message(20)
    assert carried.carry(x) is x
    assert (carried.counts.lost, carried.counts.resent, carried.counts.rounds) == (3, 6, 3)
    assert carried.carry(x) is x
    assert (carried.counts.lost, carried.counts.resent, carried.counts.rounds) == (4, 7, 4)
    assert carried.counts.packets == 10
    assert resend(Script(), np.zeros(3, bool), ChainState(True, 0.5), Draws(1, 0)) == (
        0,
        0,
        ChainState(True, 0.5),
    )


def test_retransmissions_of_a_bernoulli_link_are_geometric() -> None:
    """Each packet needs 1/(1-p) transmissions on average; 4 σ of a geometric sum."""
    carried = link(Bernoulli(0.4), "retransmitted", payload=4)
    x = torch.zeros(20_000)
    assert carried.carry(x) is x
    mean, sigma = 0.4 / 0.6, (0.4 / 0.6**2 / 20_000) ** 0.5
    assert abs(carried.counts.resent / 20_000 - mean) <= 4 * sigma


@pytest.mark.parametrize(
    ("model", "replacement", "message"),
    [
        (Bernoulli(0.1), "guess", r"replacement must be one of \('zero', .*got 'guess'"),
        (Bernoulli(1.0), "retransmitted", "however often it is sent"),
        (GilbertElliott(0.1, 0.0), "retransmitted", "however often it is sent"),
        (GilbertElliott(0.1, 0.2, 1.0, 1.0), "retransmitted", "some must arrive in the end"),
    ],
)
def test_links_that_cannot_be_are_refused(model, replacement: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        link(model, replacement)


# --- links ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("replacement", ["zero", "stale", "rescaled", "retransmitted"])
def test_without_loss_the_message_itself_arrives(replacement: str, dtype: torch.dtype) -> None:
    for model in (Bernoulli(0.0), GilbertElliott(0.0, 0.4), GilbertElliott(0.3, 0.4, 0.0, 0.0)):
        carried, x = link(model, replacement), message(dtype=dtype)
        for _ in range(3):
            assert carried.carry(x) is x
        assert carried.counts.lost == 0
        assert carried.counts.packets == 3 * count_packets(24, 16 // dtype.itemsize)


def test_a_link_applies_the_masks_of_its_model() -> None:
    """Six packets of four elements; what is lost follows from the numbers, drawn here again."""
    model = GilbertElliott(0.3, 0.4, 0.1, 0.9)
    links = {name: link(model, name) for name in ("zero", "stale", "rescaled")}
    state, last, counts = model.start(Draws(KEY, 0)), torch.zeros(24), Counts()
    in_burst = False
    for number in range(40):
        x = message(start=1 + number)
        sent = model.send(6, state, Draws(KEY, number), 0)
        state = sent.after
        lost = torch.from_numpy(sent.lost.copy()).repeat_interleave(4)
        last = torch.where(lost, last, x)
        arrived = int((~sent.lost).sum())
        expected = {
            "zero": x * ~lost,
            "stale": last,
            "rescaled": x * ~lost * (6 / arrived if arrived else 1),
        }
        for name, each in links.items():
            assert torch.equal(each.carry(x), expected[name])
        for i in range(6):
            counts.bursts += bool(sent.lost[i] and not in_burst)
            in_burst = bool(sent.lost[i])
        counts.lost += int(sent.lost.sum())
        counts.in_bad += int(sent.bad.sum())
    assert counts.lost > counts.bursts > 20
    for each in links.values():
        found = each.counts
        assert (found.messages, found.packets, found.payload_bytes) == (40, 240, 40 * 96)
        assert (found.lost, found.bursts, found.in_bad) == (
            counts.lost,
            counts.bursts,
            counts.in_bad,
        )


def test_what_was_lost_changes_from_message_to_message() -> None:
    carried, x = link(Bernoulli(0.5)), torch.ones(400)
    patterns = {tuple(carried.carry(x).tolist()) for _ in range(10)}
    assert len(patterns) == 10


def test_inputs_are_never_written_and_the_models_generators_not_read() -> None:
    torch.manual_seed(1)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    for replacement in ("zero", "stale", "rescaled", "retransmitted"):
        carried, x = link(Bernoulli(0.5), replacement), message(60)
        result = carried.carry(x)
        assert torch.equal(x, message(60))
        assert torch.equal(result, x) == (replacement == "retransmitted")
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()


@pytest.mark.parametrize("replacement", ["zero", "stale", "rescaled", "retransmitted"])
def test_nothing_is_read_from_the_device(replacement: str) -> None:
    """A tensor without values has none to wait for: whoever reads one raises."""
    one, other = (link(HALF, replacement) for _ in range(2))
    for _ in range(3):
        arrived = one.carry(torch.empty(60, device="meta", dtype=torch.bfloat16))
        other.carry(torch.empty(60, dtype=torch.bfloat16))
        assert (arrived.device.type, arrived.dtype) == ("meta", torch.bfloat16)
    assert one.counts == other.counts
    assert one.counts.lost > 0
    with pytest.raises(RuntimeError, match="meta"):
        arrived.sum().item()


def test_messages_without_elements_and_strided_ones() -> None:
    carried = link(Bernoulli(0.5))
    assert carried.carry(torch.zeros(0, 4)).shape == (0, 4)
    assert (carried.counts.messages, carried.counts.packets) == (1, 0)
    x = message(24).reshape(4, 6).t()
    strided, whole = link(Bernoulli(0.5)), link(Bernoulli(0.5))
    assert torch.equal(strided.carry(x), whole.carry(x.contiguous()))


def test_links_go_on_after_a_checkpoint(tmp_path) -> None:
    for replacement in ("stale", "retransmitted"):
        model = GilbertElliott(0.2, 0.3, 0.05, 0.9, step="message")
        one = link(model, replacement)
        for number in range(7):
            one.carry(message(start=number))
        torch.save(one.state_dict(), tmp_path / "link.pt")
        other = link(model, replacement)
        other.load_state_dict(torch.load(tmp_path / "link.pt", weights_only=True))
        for number in range(7):
            assert torch.equal(one.carry(message(start=number)), other.carry(message(start=number)))
        assert one.counts == other.counts
        assert one.counts.messages == 14
        # What was sent before the checkpoint is not counted again.
        third = link(model, replacement)
        third.load_state_dict(torch.load(tmp_path / "link.pt", weights_only=True))
        third.state = link(model, replacement).state
        for number in range(9):
            third.carry(message(start=number))
        assert (third.counts.repeated, third.counts.messages) == (7, 9)
        fresh = link(model, replacement)
        assert fresh.counts != one.counts


def test_what_is_sent_again_from_an_earlier_state_is_lost_again() -> None:
    carried = link(GilbertElliott(0.2, 0.3), "stale")
    carried.carry(message())
    before = carried.state
    first = [carried.carry(message(start=k)) for k in range(5)]
    after, counts = carried.state, Counts(**vars(carried.counts))
    carried.state = before
    again = [carried.carry(message(start=k)) for k in range(5)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert (carried.counts.repeated, carried.counts.messages) == (5, 6)
    carried.counts.repeated = 0
    assert carried.counts == counts
    assert torch.equal(carried.state.last, after.last)


# --- statistics ----------------------------------------------------------------------------


def test_rows_say_what_follows_from_counts_and_add_up() -> None:
    counts = Counts(messages=2, packets=10, payload_bytes=160, lost=4, bursts=2, in_bad=5)
    counts = counts.plus(Counts(resent=6, rounds=3, repeated=1))
    row = counts.row()
    assert (row["loss_rate"], row["mean_burst"], row["bad_share"]) == (0.4, 2.0, 0.5)
    assert Counts().row()["loss_rate"] is None
    rows = [
        {"rank": rank, "place": place, **counts.row()} for rank in (0, 1) for place in ("a", "b")
    ]
    by_place = sum_counts(rows, ("place",))
    assert [row["place"] for row in by_place] == ["a", "b"]
    assert all(row["packets"] == 20 and row["loss_rate"] == 0.4 for row in by_place)
    (whole,) = sum_counts(rows, ())
    found = [whole[name] for name in ("packets", "resent", "rounds", "repeated")]
    assert found == [40, 24, 12, 4]
    assert json.loads(json.dumps(rows)) == rows
    with pytest.raises(ValueError, match="a row has no column 'layer'; it has"):
        sum_counts(rows, ("layer",))
