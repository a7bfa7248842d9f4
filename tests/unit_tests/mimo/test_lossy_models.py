# SPDX-License-Identifier: Apache-2.0
"""When packets are lost: rates, runs and correlations against theory, parameters, presets.

One process, no tensors. Samples are 4 standard deviations wide: seeds are fixed, so a test that
passes passes always, and a rate that is off by a few percent does not.
"""

from __future__ import annotations

import math
import re
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.core.models.mimo.lossy.draws import Draws, stream_key
from megatron.core.models.mimo.lossy.loss_models import (
    PRESETS,
    Bernoulli,
    ChainState,
    GilbertElliott,
    from_gilbert,
    from_loss_and_burst,
    preset,
    walk,
)

# Nothing of Megatron-Core is in them.
pytestmark = pytest.mark.once

PACKETS = 200_000


def sent(model: Any, packets: int = PACKETS, seed: int = 1, state: ChainState | None = None) -> Any:
    draws = Draws(stream_key(seed, "here", 0), 0)
    return model.send(packets, state or model.start(draws), draws, 0)


def within(found: float, expected: float, sigma: float) -> bool:
    return abs(found - expected) <= 4 * sigma


def sigma_of_mean(rate: float, count: int, memory: float = 0.0) -> float:
    """Of the mean of a two-valued sequence whose autocorrelation falls by ``memory`` per step."""
    return math.sqrt(rate * (1 - rate) / count * (1 + memory) / (1 - memory))


# --- draws ---------------------------------------------------------------------------------


def test_draws_depend_on_key_message_and_purpose_alone() -> None:
    draws = Draws(stream_key(1, "a", 0), 3)
    first = draws.uniform(0, 100)
    draws.uniform(1, 7)
    assert np.array_equal(draws.uniform(0, 100), first)
    assert np.array_equal(draws.uniform(0, 10), first[:10])
    others = [Draws(stream_key(*key), 3) for key in ((2, "a", 0), (1, "b", 0), (1, "a", 1))]
    others += [Draws(draws.key, 4)]
    for other in [each.uniform(0, 100) for each in others] + [draws.uniform(1, 100)]:
        assert not np.intersect1d(other, first).size


def test_draws_are_those_of_every_machine_and_version() -> None:
    """Written down once: a pattern that changes with NumPy would make runs incomparable."""
    drawn = Draws(stream_key(1, "a", 0), 3).uniform(0, 3)
    assert [f"{x:.12f}" for x in drawn] == RECORDED


RECORDED = ["0.716614739512", "0.840961427661", "0.101572272238"]


def test_messages_and_ranks_are_independent() -> None:
    """Correlation of loss between consecutive messages, and between ranks: 0 within 4 σ."""
    model, count = Bernoulli(0.3), 100_000
    keys = [stream_key(1, "layer", rank) for rank in (0, 1)]
    lost = [
        model.send(count, ChainState(False, 0.0), Draws(key, message), 0).lost
        for key in keys
        for message in (0, 1)
    ]
    for i, j in ((0, 1), (0, 2), (1, 3), (0, 3)):
        together = np.corrcoef(lost[i], lost[j])[0, 1]
        assert abs(together) <= 4 / math.sqrt(count)
        assert not np.array_equal(lost[i], lost[j])


# --- Bernoulli -----------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.5, 0.99])
def test_bernoulli_loses_its_share(rate: float) -> None:
    lost = sent(Bernoulli(rate)).lost
    assert within(lost.mean(), rate, sigma_of_mean(rate, PACKETS))
    neighbours = np.corrcoef(lost[1:], lost[:-1])[0, 1]
    assert abs(neighbours) <= 4 / math.sqrt(PACKETS)
    assert Bernoulli(rate).mean_loss == rate


@pytest.mark.parametrize("model", [Bernoulli(1.0), Bernoulli(1.0, unit="message")])
def test_a_rate_of_one_loses_all_and_of_zero_nothing(model: Bernoulli) -> None:
    assert sent(model, 1000).lost.all()
    assert not sent(Bernoulli(0.0, unit=model.unit), 1000).lost.any()
    assert model.may_stay_lost
    assert not Bernoulli(0.999).may_stay_lost


def test_bernoulli_per_message_loses_whole_messages() -> None:
    model, count = Bernoulli(0.25, unit="message"), 2000
    state = ChainState(False, 0.0)
    lost = [model.send(7, state, Draws(5, message), 0).lost for message in range(count)]
    assert all(each.all() or not each.any() for each in lost)
    assert within(np.mean([each[0] for each in lost]), 0.25, sigma_of_mean(0.25, count))
    assert model.send(0, state, Draws(5, 0), 0).lost.size == 0


# --- Gilbert–Elliott ------------------------------------------------------------------------

CHAINS = [
    GilbertElliott(0.05, 0.45),
    GilbertElliott(0.01, 0.19, 0.002, 0.7),
    GilbertElliott(0.005, 0.3, 0.0, 0.65),
    GilbertElliott(0.9, 0.6, 0.1, 0.8),  # p_gb + p_bg > 1: neighbours are anticorrelated
]


@pytest.mark.parametrize("model", CHAINS, ids=str)
def test_the_chain_is_as_theory_says(model: GilbertElliott) -> None:
    out = sent(model)
    share, memory = model.bad_share, model.memory
    assert within(out.bad.mean(), share, sigma_of_mean(share, PACKETS, memory))
    # The variance of the losses: their own, and the chain's correlation between them.
    spread = (model.loss_bad - model.loss_good) ** 2 * share * (1 - share)
    own = model.mean_loss * (1 - model.mean_loss)
    sigma = math.sqrt((own + 2 * spread * memory / (1 - memory)) / PACKETS)
    assert within(out.lost.mean(), model.mean_loss, sigma)
    runs = [(bad, len(list(run))) for bad, run in groupby(out.bad.tolist())]
    for bad, leave in ((True, model.p_bg), (False, model.p_gb)):
        lengths = [length for state, length in runs[1:-1] if state == bad]
        sigma = math.sqrt((1 - leave) / len(lengths)) / leave
        assert within(float(np.mean(lengths)), 1 / leave, sigma)
    # The next state given this one: two binomials, whose difference is the lag-1 correlation.
    bad, after = out.bad[:-1], out.bad[1:]
    stays, comes = after[bad].mean(), after[~bad].mean()
    sigma = math.hypot(
        sigma_of_mean(1 - model.p_bg, int(bad.sum())), sigma_of_mean(model.p_gb, int((~bad).sum()))
    )
    assert within(stays - comes, memory, sigma)
    assert model.mean_burst == pytest.approx(1 / model.p_bg)


def slow_walk(bad: bool, to_bad: Any, to_good: Any, drawn: Any) -> list[bool]:
    states = [bad]
    for leave_good, leave_bad, u in zip(to_bad, to_good, drawn, strict=True):
        states.append(bool(u < 1 - leave_bad if states[-1] else u < leave_good))
    return states


def test_the_walk_without_a_loop_is_the_one_with() -> None:
    rng = np.random.default_rng(0)
    for n in (0, 1, 2, 50, 300):
        to_bad, to_good, drawn = rng.random((3, n))
        for bad in (False, True):
            assert walk(bad, to_bad, to_good, drawn).tolist() == slow_walk(
                bad, to_bad, to_good, drawn
            )


def test_equal_losses_are_bernoullis() -> None:
    out = sent(GilbertElliott(0.05, 0.45, 0.2, 0.2))
    assert within(out.lost.mean(), 0.2, sigma_of_mean(0.2, PACKETS))
    assert abs(np.corrcoef(out.lost[1:], out.lost[:-1])[0, 1]) <= 4 / math.sqrt(PACKETS)


@pytest.mark.parametrize("start_state", ["good", "bad"])
def test_a_chain_that_never_moves_stays(start_state: str) -> None:
    model = GilbertElliott(0.0, 0.0, start_state=start_state)
    out = sent(model, 1000)
    assert (out.lost == (start_state == "bad")).all()
    assert out.after.bad == (start_state == "bad")
    assert model.mean_loss == float(start_state == "bad")
    assert model.may_stay_lost
    assert GilbertElliott(0.1, 0.0, start_state="good").mean_burst == math.inf


def test_no_way_to_bad_and_no_loss_in_good_lose_nothing() -> None:
    assert not sent(GilbertElliott(0.0, 0.3)).lost.any()
    assert not sent(GilbertElliott(0.5, 0.3, 0.0, 0.0)).lost.any()


def test_start_states() -> None:
    count = 2000
    for start_state, share in (("good", 0.0), ("bad", 1.0), ("stationary", 0.1)):
        model = GilbertElliott(0.05, 0.45, start_state=start_state)
        bad = [model.start(Draws(stream_key(1, "x", r), 0)).bad for r in range(count)]
        assert within(float(np.mean(bad)), share, sigma_of_mean(share, count))
        # The first packet meets the first state: the step comes after it.
        state = ChainState(True, 0.0)
        assert sent(GilbertElliott(1.0, 1.0), 4, state=state).bad.tolist() == [True, False] * 2


def test_a_chain_goes_on_over_messages_as_in_one() -> None:
    """Messages of 10 packets are as correlated over their borders as within."""
    model, state, messages = GilbertElliott(0.02, 0.1), ChainState(False, 0.0), 4_000
    bad = []
    for message in range(messages):
        out = model.send(10, state, Draws(7, message), 0)
        state = out.after
        bad.append(out.bad)
    last, first = np.array(bad)[:-1, -1], np.array(bad)[1:, 0]
    share = model.bad_share
    sigma = math.sqrt((1 - model.memory**2) / (messages * share * (1 - share)))
    assert within(np.corrcoef(last, first)[0, 1], model.memory, sigma)


def test_a_step_per_message_keeps_its_state_within() -> None:
    model, state, count = GilbertElliott(0.1, 0.3, 0.0, 0.5, step="message"), None, 4_000
    bad, lost = [], 0
    for message in range(count):
        draws = Draws(11, message)
        out = model.send(5, state or model.start(draws), draws, 0)
        assert len(set(out.bad.tolist())) == 1
        bad.append(out.bad[0])
        lost, state = lost + int(out.lost.sum()), out.after
    assert within(float(np.mean(bad)), 0.25, sigma_of_mean(0.25, count, model.memory))
    sigma = sigma_of_mean(0.25, count, model.memory) + sigma_of_mean(0.125, 5 * count)
    assert within(lost / (5 * count), model.mean_loss, sigma)
    one = ChainState(True, 0.0)
    assert model.send(0, one, Draws(11, 0), 0).after == one


def test_a_step_of_time_moves_with_the_clock() -> None:
    """Packets half a step apart share a state in pairs; a long gap forgets, as the power says."""
    model = GilbertElliott(1.0, 1.0, step="time", packet_time=0.5, message_gap=0.25)
    state = ChainState(False, 0.0)
    out = model.send(5, state, Draws(1, 0), 0)
    assert out.bad.tolist() == [False, False, True, True, False]
    assert out.after == ChainState(False, 0.75)  # at 2.75: floor is 2, an even number of flips
    again = model.send(2, out.after, Draws(1, 1), 0)
    assert again.bad.tolist() == [False, True]  # at 2.75 and 3.25
    slow = GilbertElliott(0.02, 0.06, step="time", packet_time=8.0)
    out = sent(slow)
    memory = slow.memory**8
    stays = out.bad[1:][out.bad[:-1]].mean()
    expected = slow.bad_share + (1 - slow.bad_share) * memory
    assert within(stays, expected, sigma_of_mean(expected, int(out.bad.sum())))
    assert within(out.bad.mean(), 0.25, sigma_of_mean(0.25, PACKETS, memory))


# --- parameters -----------------------------------------------------------------------------

TABLE = {  # mean loss in percent, mean burst, as published with the presets
    "default": (10, 2.2),
    "one": (5, 5.3),
    "one_percent": (1.07, 3.3),
    "half_percent": (0.50, 5),
    "point2": (0.20, 2.2),
    "long_point1": (0.1, 20),
    "long_2percent": (2, 51),
    "short_1percent": (1, 1.7),
    "short_2percent": (2, 2),
}


def test_presets_are_those_of_the_table() -> None:
    assert set(PRESETS) == set(TABLE)
    for name, (percent, burst) in TABLE.items():
        model = preset(name)
        # Half a unit of the last digit that is printed.
        assert 100 * model.mean_loss == pytest.approx(percent, abs=0.01 if percent < 2 else 0.05)
        assert model.mean_burst == pytest.approx(burst, abs=0.05)
        back = from_loss_and_burst(
            model.mean_loss, model.mean_burst, model.loss_good, model.loss_bad
        )
        for field in ("p_gb", "p_bg", "loss_good", "loss_bad"):
            assert getattr(back, field) == pytest.approx(getattr(model, field), rel=1e-9)


def test_gilberts_letters() -> None:
    model = from_gilbert(0.1, 0.4, k=0.99, h=0.2)
    assert (model.p_gb, model.p_bg, model.loss_bad) == (0.1, 0.4, 0.8)
    assert model.loss_good == pytest.approx(0.01)
    assert from_gilbert(0.1, 0.4) == GilbertElliott(0.1, 0.4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Bernoulli(1.5), r"rate is a probability: from 0 to 1, got 1\.5"),
        (lambda: Bernoulli(float("nan")), "rate is a probability"),
        (lambda: Bernoulli(0.1, unit="byte"), r"unit must be one of \('packet', 'message'\)"),
        (lambda: GilbertElliott(-0.1, 0.4), r"p_gb is a probability.*-0\.1"),
        (lambda: GilbertElliott(0.1, 0.4, 0.5, 0.2), r"at most loss_bad, got 0\.5 and 0\.2"),
        (lambda: GilbertElliott(0.1, 0.4, step="byte"), "step must be one of"),
        (lambda: GilbertElliott(0.1, 0.4, start_state="x"), "start_state must be one of"),
        (lambda: GilbertElliott(0.0, 0.0), "no stationary state; give start_state='good'"),
        (lambda: GilbertElliott(0.1, 0.4, step="time"), "step='time', which needs one above 0"),
        (lambda: GilbertElliott(0.1, 0.4, packet_time=1.0), "got step='packet' and"),
        (
            lambda: GilbertElliott(0.1, 0.4, step="time", packet_time=2.0, message_gap=-1.0),
            "must be 0 or more steps",
        ),
        (lambda: from_loss_and_burst(0.5, 0.5), "burst must be 1 packet or more, got 0.5"),
        (lambda: from_loss_and_burst(0.8, 2.0), "needs bursts of at least 4 packets, got 2"),
        (lambda: from_loss_and_burst(0.1, 2.0, 0.2, 0.9), r"got 0\.1 with \[0\.2, 0\.9\)"),
        (lambda: preset("nine"), "preset must be one of"),
    ],
)
def test_what_cannot_be_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_wrong_chain_is_noticed() -> None:
    """The control: swapped transitions miss every bound above by far."""
    model, wrong = GilbertElliott(0.05, 0.45), sent(GilbertElliott(0.45, 0.05))
    assert not within(
        wrong.lost.mean(), model.mean_loss, sigma_of_mean(0.1, PACKETS, model.memory)
    )


# --- docs/lossy.md --------------------------------------------------------------------------


def page() -> str:
    """Read where it is needed: trees in which mutants are tried have no docs."""
    return (Path(__file__).resolve().parents[3] / "docs" / "lossy.md").read_text("utf-8")


def test_the_pages_table_has_the_presets() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([\d.e| -]+) \| ([\d.]+) % \| ([\d.]+) \|$", page(), re.M)
    found = {name: tuple(map(float, values.split(" | "))) for name, values, *_ in rows}
    assert found == PRESETS
    assert {name: (float(loss), float(burst)) for name, _, loss, burst in rows} == TABLE


def test_the_pages_programs_run() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", page(), re.M | re.S)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "docs/lossy.md", "exec"), {})
