# SPDX-License-Identifier: Apache-2.0
"""Which links lose packets, and how: rules, of which the first that fits a place holds."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from megatron.core.models.mimo.lossy.loss_models import LossModel
from megatron.core.models.mimo.lossy.packets import PAYLOAD, check_payload
from megatron.core.models.mimo.lossy.replacements import check_replacement

FORWARD, BACKWARD = "forward", "backward"
DIRECTIONS = (FORWARD, BACKWARD)
SENDER, RECEIVER = "sender", "receiver"
SIDES = (SENDER, RECEIVER)
SUM, GATHER, REDUCE_SCATTER, EXCHANGE = "sum", "gather", "reduce_scatter", "exchange"
GRADIENTS = "gradients"
# Of activations and their gradients.
WITHIN_A_PASS = (SUM, GATHER, REDUCE_SCATTER, EXCHANGE)
COLLECTIVES = (*WITHIN_A_PASS, GRADIENTS)


@dataclass(frozen=True)
class LinkRule:
    """Links of some places lose packets.

    Args:
        layers: which layers, as a pattern of their names: ``*`` stands for anything, e.g.
            ``"*.layers.3.*"``, ``"modality_submodules.images.*"``, ``"bridge.*"``,
            ``"gradients.*"``.
        loss: when packets are lost.
        directions: of the pass: ``"forward"``, ``"backward"``.
        collectives: which of ``COLLECTIVES``; ``"exchange"`` is a bridge's. ``"gradients"``, the
            reduction over DP, is in a rule only if it is named.
        replacement: what stands in the place of a lost packet, see ``replacements``.
        side: where packets are lost. At the ``"sender"`` all ranks, the sender too, miss the same
            and replicas stay equal. At the ``"receiver"`` each rank misses others; replicas part.
        payload: bytes per packet.
        common_mode: all senders (or receivers) of a place lose the same packets.

    Raises:
        ValueError: an unknown direction, collective, replacement or side, or none; no payload.
    """

    layers: str
    loss: LossModel
    directions: tuple[str, ...] = DIRECTIONS
    collectives: tuple[str, ...] = WITHIN_A_PASS
    replacement: str = "zero"
    side: str = SENDER
    payload: int = PAYLOAD
    common_mode: bool = False

    def __post_init__(self) -> None:
        _check_some("directions", self.directions, DIRECTIONS)
        _check_some("collectives", self.collectives, COLLECTIVES)
        if self.side not in SIDES:
            raise ValueError(f"side must be one of {SIDES}, got {self.side!r}")
        check_payload(self.payload)
        check_replacement(self.replacement, self.loss)

    def fits(self, name: str, direction: str, collective: str) -> bool:
        """Return whether the rule is about a place."""
        about = direction in self.directions and collective in self.collectives
        return about and fnmatchcase(name, self.layers)


@dataclass(frozen=True)
class LossySpec:
    """Rules and a seed, the same on all ranks.

    Args:
        rules: the first that fits a place holds; a place that none fits loses nothing.
        seed: of the links' own random numbers.
    """

    rules: tuple[LinkRule, ...]
    seed: int

    def rule(self, name: str, direction: str, collective: str) -> LinkRule | None:
        """Return the rule of a place, if there is one."""
        fitting = (each for each in self.rules if each.fits(name, direction, collective))
        return next(fitting, None)


def _check_some(name: str, values: tuple[str, ...], known: tuple[str, ...]) -> None:
    if isinstance(values, str) or not values or set(values) - set(known):
        raise ValueError(f"{name} must be a tuple of some of {known}, got {values!r}")
