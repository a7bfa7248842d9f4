# SPDX-License-Identifier: Apache-2.0
"""When packets are lost: Bernoulli's and Gilbert–Elliott's models.

Gilbert–Elliott: a chain of two states, good and bad. ``p_gb`` and ``p_bg`` are the probabilities of
going from good to bad and back, ``loss_good`` and ``loss_bad`` those of losing a packet in a state.

| of the chain                   |                                                   |
|--------------------------------|---------------------------------------------------|
| share of time in bad           | ``π = p_gb / (p_gb + p_bg)``                      |
| mean loss                      | ``L = π · loss_bad + (1 − π) · loss_good``        |
| mean length of a bad, good run | ``1 / p_bg``, ``1 / p_gb``                        |
| autocorrelation at lag k       | ``(1 − p_gb − p_bg) ** k``                        |

Lengths and lags are in steps of the chain. A step is one packet, one message, or a unit of time:
then packets leave ``packet_time`` apart and messages ``message_gap``. (Gilbert 1960, Elliott 1963.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megatron.core.models.mimo.lossy.draws import START, Draws

UNITS = ("packet", "message")
STEPS = ("packet", "message", "time")
START_STATES = ("good", "bad", "stationary")


@dataclass(frozen=True)
class ChainState:
    """Where a chain is before the next packet.

    Attributes:
        bad: in the bad state.
        phase: time since the chain's last step, in [0, 1); 0 unless its step is time.
    """

    bad: bool
    phase: float


@dataclass(frozen=True)
class Transmission:
    """What became of packets that were sent.

    Attributes:
        lost: ``(packets,)`` bool.
        bad: ``(packets,)`` bool: sent while the chain was in bad.
        after: the chain's state for the next packet.
    """

    lost: np.ndarray
    bad: np.ndarray
    after: ChainState


class LossModel(Protocol):
    """When packets are lost; immutable, its state is kept by the link."""

    def start(self, draws: Draws, /) -> ChainState:
        """Return the state before the first packet of a link."""
        ...

    def send(self, packets: int, state: ChainState, draws: Draws, purpose: int) -> Transmission:
        """Send packets.

        Args:
            packets: how many; none leave the state as it is.
            state: of the chain.
            draws: the message's numbers.
            purpose: ``purpose`` and ``purpose + 1`` are the draws of this transmission.
        """
        ...

    @property
    def mean_loss(self) -> float:
        """The share of packets that is lost in the long run."""
        ...

    @property
    def may_stay_lost(self) -> bool:
        """Whether a packet may be lost however often it is sent."""
        ...


@dataclass(frozen=True)
class Bernoulli:
    """Lose each packet, or each whole message, with one probability.

    Args:
        rate: the probability, in [0, 1].
        unit: what is lost as a whole: ``"packet"`` or ``"message"``.

    Raises:
        ValueError: a rate outside [0, 1]; an unknown unit.
    """

    rate: float
    unit: str = "packet"

    def __post_init__(self) -> None:
        _check_probabilities(rate=self.rate)
        _check_choice("unit", self.unit, UNITS)

    def start(self, _draws: Draws, /) -> ChainState:
        """Return the only state."""
        return ChainState(False, 0.0)

    def send(self, packets: int, state: ChainState, draws: Draws, purpose: int) -> Transmission:
        """Send packets, see :meth:`LossModel.send`."""
        drawn = draws.uniform(purpose, packets if self.unit == "packet" else min(packets, 1))
        lost = np.broadcast_to(drawn < self.rate, (packets,))
        return Transmission(lost, np.zeros(packets, bool), state)

    @property
    def mean_loss(self) -> float:
        """The share of packets that is lost in the long run."""
        return self.rate

    @property
    def may_stay_lost(self) -> bool:
        """Whether a packet may be lost however often it is sent."""
        return self.rate == 1


@dataclass(frozen=True)
class GilbertElliott:
    """Lose packets in bursts; the module's docstring has the formulas.

    Args:
        p_gb, p_bg: probabilities of going to bad and back, per step.
        loss_good, loss_bad: of losing a packet in a state; 0 <= loss_good <= loss_bad <= 1.
        step: of the chain: ``"packet"``, ``"message"`` (one state per message) or ``"time"``.
        start_state: before the first packet: ``"good"``, ``"bad"`` or drawn, ``"stationary"``.
        packet_time, message_gap: with ``step="time"``: steps between two packets of a message, and
            further ones between two messages; any numbers from 0 on.

    Raises:
        ValueError: a probability outside [0, 1]; less loss in bad; an unknown choice; a chain that
            never moves and is to start stationary; times with a step that is not time, or none.
    """

    p_gb: float
    p_bg: float
    loss_good: float = 0.0
    loss_bad: float = 1.0
    step: str = "packet"
    start_state: str = "stationary"
    packet_time: float = 0.0
    message_gap: float = 0.0

    def __post_init__(self) -> None:
        _check_probabilities(
            p_gb=self.p_gb, p_bg=self.p_bg, loss_good=self.loss_good, loss_bad=self.loss_bad
        )
        if self.loss_good > self.loss_bad:
            raise ValueError(
                f"loss_good must be at most loss_bad, got {self.loss_good} and {self.loss_bad}; "
                "swap the states"
            )
        _check_choice("step", self.step, STEPS)
        _check_choice("start_state", self.start_state, START_STATES)
        if self.start_state == "stationary" and self.p_gb + self.p_bg == 0:
            raise ValueError(
                "with p_gb = p_bg = 0 the chain stays where it starts and has no stationary state; "
                "give start_state='good' or 'bad'"
            )
        self._check_times()

    def _check_times(self) -> None:
        times = (self.packet_time, self.message_gap)
        if not all(0 <= each < float("inf") for each in times):
            raise ValueError(f"packet_time and message_gap must be 0 or more steps, got {times}")
        if (self.step == "time") != (sum(times) > 0):
            raise ValueError(
                f"packet_time and message_gap are those of step='time', which needs one above 0; "
                f"got step={self.step!r} and {times}"
            )

    @property
    def bad_share(self) -> float:
        """The share π of time in bad, in the long run; of a chain that stays, where it stays."""
        if self.p_gb + self.p_bg == 0:
            return float(self.start_state == "bad")
        return self.p_gb / (self.p_gb + self.p_bg)

    @property
    def mean_loss(self) -> float:
        """The share of packets that is lost in the long run."""
        return self.bad_share * self.loss_bad + (1 - self.bad_share) * self.loss_good

    @property
    def mean_burst(self) -> float:
        """The mean length of a stay in bad, in steps; infinite if it never ends."""
        return 1 / self.p_bg if self.p_bg else float("inf")

    @property
    def memory(self) -> float:
        """The autocorrelation of the state over one step, in [-1, 1]."""
        return 1 - self.p_gb - self.p_bg

    @property
    def may_stay_lost(self) -> bool:
        """Whether a packet may be lost however often it is sent."""
        return self.loss_good == 1 or (self.loss_bad == 1 and self.p_bg == 0)

    def start(self, draws: Draws, /) -> ChainState:
        """Return the state before the first packet of a link."""
        drawn = draws.uniform(START, 1)[0]
        share = {"good": 0.0, "bad": 1.0}.get(self.start_state, self.bad_share)
        return ChainState(bool(drawn < share), 0.0)

    def send(self, packets: int, state: ChainState, draws: Draws, purpose: int) -> Transmission:
        """Send packets, see :meth:`LossModel.send`."""
        if packets == 0:
            return Transmission(np.zeros(0, bool), np.zeros(0, bool), state)
        states, phase = self._states(packets, state, draws.uniform(purpose, packets))
        bad = states[:-1]
        lost = draws.uniform(purpose + 1, packets) < np.where(bad, self.loss_bad, self.loss_good)
        return Transmission(lost, bad, ChainState(bool(states[-1]), phase))

    def _states(
        self, packets: int, state: ChainState, drawn: np.ndarray
    ) -> tuple[np.ndarray, float]:
        """The states of all packets and of the next one, and the phase then."""
        if self.step == "packet":
            return walk(state.bad, self.p_gb, self.p_bg, drawn), 0.0
        if self.step == "message":
            after = walk(state.bad, self.p_gb, self.p_bg, drawn[:1])[1:]
            return np.concatenate([np.full(packets, state.bad), after]), 0.0
        times = state.phase + self.packet_time * np.arange(packets + 1)
        times[-1] += self.message_gap
        # In k steps the state is forgotten but for memory ** k of it.
        moved = 1 - np.power(self.memory, np.diff(np.floor(times)))
        share = self.bad_share
        states = walk(state.bad, share * moved, (1 - share) * moved, drawn)
        return states, float(times[-1] - np.floor(times[-1]))


def walk(
    bad: bool, to_bad: np.ndarray | float, to_good: np.ndarray | float, drawn: np.ndarray
) -> np.ndarray:
    """Return the states of a chain, ``(n + 1,)`` bool, True in bad, from its first on.

    A number below both thresholds sends the chain to bad from either state, one above both to
    good; one between them keeps the state, or flips it, whichever way the thresholds lie. So a
    state follows from the last certain one and the flips since: no loop over packets.

    Args:
        bad: the first state.
        to_bad, to_good: probabilities of leaving good, and bad: one, or ``(n,)`` of each step.
        drawn: ``(n,)`` numbers in [0, 1).
    """
    from_good, from_bad = drawn < to_bad, drawn < 1 - to_good  # the state that follows each
    certain = np.concatenate([[True], from_good == from_bad])
    value = np.concatenate([[bad], from_good])
    last = np.maximum.accumulate(np.where(certain, np.arange(certain.size), 0))
    flips = np.cumsum(np.concatenate([[False], from_good & ~from_bad]))
    return value[last] ^ ((flips - flips[last]) % 2 == 1)


def from_loss_and_burst(
    loss: float, burst: float, loss_good: float = 0.0, loss_bad: float = 1.0
) -> GilbertElliott:
    """Return the chain per packet with a mean loss and a mean length of its bad runs.

    Args:
        loss: in [loss_good, loss_bad).
        burst: in packets, 1 or more.
        loss_good, loss_bad: of losing a packet in a state, ``loss_good < loss_bad``.

    Raises:
        ValueError: a loss or burst outside these; so much loss in so short bursts is impossible.
    """
    _check_probabilities(loss=loss, loss_good=loss_good, loss_bad=loss_bad)
    if not loss_good <= loss < loss_bad:
        raise ValueError(
            f"loss must be at least loss_good and less than loss_bad, got {loss} with "
            f"[{loss_good}, {loss_bad})"
        )
    if not 1 <= burst < float("inf"):
        raise ValueError(f"burst must be 1 packet or more, got {burst}")
    share = (loss - loss_good) / (loss_bad - loss_good)
    if share / (1 - share) > burst:
        raise ValueError(
            f"a loss of {loss} needs bursts of at least {share / (1 - share):.4g} packets, "
            f"got {burst}"
        )
    return GilbertElliott(share / (1 - share) / burst, 1 / burst, loss_good, loss_bad)


def from_gilbert(p: float, r: float, k: float = 1.0, h: float = 0.0) -> GilbertElliott:
    """Return the chain per packet in Gilbert's letters.

    Args:
        p, r: probabilities of going to bad and back.
        k, h: of *not* losing a packet in good, and in bad.
    """
    return GilbertElliott(p, r, 1 - k, 1 - h)


# Name -> p_gb, p_bg, loss_good, loss_bad; mean loss and burst in docs/lossy.md.
PRESETS = {
    "default": (0.05, 0.45, 0.0, 1.0),
    "one": (0.01, 0.19, 0.0, 1.0),
    "one_percent": (0.005, 0.3, 0.0, 0.65),
    "half_percent": (0.001, 0.2, 0.0, 1.0),
    "point2": (0.001, 0.45, 1e-4, 0.86),
    "long_point1": (5e-5, 0.04995, 0.0, 1.0),
    "long_2percent": (4e-4, 0.0196, 0.0, 1.0),
    "short_1percent": (0.00606, 0.6, 0.0, 1.0),
    "short_2percent": (0.0102, 0.5, 0.0, 1.0),
}


def preset(name: str) -> GilbertElliott:
    """Return a chain of the table by its name.

    Raises:
        ValueError: an unknown name.
    """
    _check_choice("preset", name, tuple(PRESETS))
    return GilbertElliott(*PRESETS[name])


def _check_probabilities(**values: float) -> None:
    for name, value in values.items():
        # Also refuses NaN, and what a file says that is no number.
        if not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise ValueError(f"{name} is a probability: from 0 to 1, got {value}")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")
