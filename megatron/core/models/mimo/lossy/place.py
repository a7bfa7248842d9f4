# SPDX-License-Identifier: Apache-2.0
"""A place where packets are lost: one collective of one layer in one direction, and its links."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from megatron.core.models.mimo.lossy.draws import stream_key
from megatron.core.models.mimo.lossy.link import Link
from megatron.core.models.mimo.lossy.spec import RECEIVER, LinkRule


class Place:
    """The links of one place that end, or begin, on this rank.

    Args:
        name: of the layer, or ``bridge.`` and a modality.
        direction, collective: see :class:`.LinkRule`.
        rule: of the place.
        seed: of the spec.
        sender: who sends: a rank, or what stands for ranks that hold the same and must lose the
            same. Of a place at the receiver: this rank.
        peers: what has a link each: the ranks from which it receives, or buckets of gradients;
            empty where there is one link.

    Attributes:
        at_receiver: packets are lost where they arrive.
        lossless: nothing is lost for now.
    """

    def __init__(
        self,
        name: str,
        where: tuple[str, str],
        rule: LinkRule,
        seed: int,
        sender: int | str,
        peers: Sequence[int],
    ) -> None:
        self.name, (self.direction, self.collective) = name, where
        self.at_receiver = rule.side == RECEIVER
        self.lossless = False
        stream = f"{name} {self.direction} {self.collective}"
        who = "all" if rule.common_mode else sender
        streams = {peer: f"{stream} from {peer}" for peer in peers} if peers else {None: stream}
        self.links: dict[Any, Link] = {
            peer: Link(rule.loss, rule.replacement, stream_key(seed, text, who), rule.payload)
            for peer, text in streams.items()
        }

    @property
    def key(self) -> str:
        """What tells the place from all others of a rank."""
        return f"{self.name} {self.direction} {self.collective}"

    def carry(self, x: torch.Tensor, peer: int | None) -> torch.Tensor:
        """Return what arrives of a message; ``x`` itself if that is all of it as it is.

        Args:
            x: the message; read only.
            peer: which of the peers, of a place that has some; else None.
        """
        return x if self.lossless else self.links[peer].carry(x)

    def rows(self) -> list[dict[str, Any]]:
        """Return the counts of each link, with what names it."""
        about = {"place": self.name, "direction": self.direction, "collective": self.collective}
        return [{**about, "peer": peer, **link.counts.row()} for peer, link in self.links.items()]

    def state_dict(self) -> dict[Any, Any]:
        """Return the states of the links, for a checkpoint."""
        return {peer: link.state_dict() for peer, link in self.links.items()}

    def load_state_dict(self, saved: Mapping[Any, Any]) -> None:
        """Go on from what ``state_dict`` returned for the same place."""
        for peer, link in self.links.items():
            link.load_state_dict(saved[peer])
