# SPDX-License-Identifier: Apache-2.0
"""A link: messages go in, what arrives comes out.

What a link remembers between two messages is one immutable object, so that it can be put back
where it was: before a layer is recomputed, and from a checkpoint.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from megatron.core.models.mimo.lossy.draws import Draws
from megatron.core.models.mimo.lossy.loss_models import ChainState, LossModel, Transmission
from megatron.core.models.mimo.lossy.packets import (
    check_payload,
    count_packets,
    element_mask,
    elements_per_packet,
)
from megatron.core.models.mimo.lossy.replacements import (
    check_replacement,
    rescaled,
    resend,
    stale,
    zero,
)
from megatron.core.models.mimo.lossy.statistics import Counts


@dataclass(frozen=True, eq=False)
class LinkState:
    """What a link remembers.

    Attributes:
        messages: sent so far.
        chain: of the loss model; None before the first message.
        in_burst: the last packet was lost.
        last: what came out of the last message, kept for ``stale`` alone; never written.
    """

    messages: int
    chain: ChainState | None
    in_burst: bool
    last: torch.Tensor | None


class Link:
    """One way from one sender.

    Args:
        model: when packets are lost.
        replacement: what stands in their place, see ``replacements``.
        key: of its random numbers, see :func:`.draws.stream_key`.
        payload: bytes per packet.

    Attributes:
        state: what it remembers.
        counts: what it has carried.

    Raises:
        ValueError: an unknown replacement, a model that does not fit it, no payload.
    """

    def __init__(self, model: LossModel, replacement: str, key: int, payload: int) -> None:
        check_replacement(replacement, model)
        check_payload(payload)
        self.model, self.replacement, self.key, self.payload = model, replacement, key, payload
        self.state = LinkState(0, None, False, None)
        self.counts = Counts()
        self._counted = 0  # messages: what is sent with a lower number is sent again

    def carry(self, x: torch.Tensor) -> torch.Tensor:
        """Return what arrives of a message.

        Args:
            x: the message, any shape; read only. It is ``x`` itself that comes out if every
                element arrives as it is.
        """
        per_packet = elements_per_packet(self.payload, x.element_size())
        packets = count_packets(x.numel(), per_packet)
        before, draws = self.state, Draws(self.key, self.state.messages)
        sent = self.model.send(packets, before.chain or self.model.start(draws), draws, 0)
        resent, rounds, chain = 0, 0, sent.after
        if self.replacement == "retransmitted":
            resent, rounds, chain = resend(self.model, sent.lost, chain, draws)
        arrived = x if resent else self._replaced(x, sent.lost, per_packet)
        self._count(sent, x.numel() * x.element_size(), resent, rounds)
        self.state = LinkState(
            messages=before.messages + 1,
            chain=chain,
            in_burst=bool(sent.lost[-1]) if packets else before.in_burst,
            # A copy: sums are made in place, in what a link has let through.
            last=arrived.detach().clone() if self.replacement == "stale" else None,
        )
        return arrived

    def _replaced(self, x: torch.Tensor, lost: np.ndarray, per_packet: int) -> torch.Tensor:
        count = int(lost.sum())
        if not count:
            return x
        mask = element_mask(_to(lost, x.device), x.shape, per_packet)
        if self.replacement == "stale":
            return stale(x, mask, self.state.last)
        if self.replacement == "rescaled":
            return rescaled(x, mask, lost.size, lost.size - count)
        return zero(x, mask)

    def _count(self, sent: Transmission, size: int, resent: int, rounds: int) -> None:
        if self.state.messages < self._counted:
            self.counts.repeated += 1
            return
        self._counted = self.state.messages + 1
        self.counts.add(sent.lost, sent.bad, size, self.state.in_burst)
        self.counts.resent += resent
        self.counts.rounds += rounds

    def state_dict(self) -> dict[str, Any]:
        """Return state and counts for a checkpoint: numbers and, for ``stale``, a tensor."""
        state, chain = self.state, self.state.chain
        return {
            "messages": state.messages,
            "chain": None if chain is None else (chain.bad, chain.phase),
            "in_burst": state.in_burst,
            "last": state.last,
            "counts": asdict(self.counts),
            "counted": self._counted,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from what ``state_dict`` returned."""
        chain = None if saved["chain"] is None else ChainState(*saved["chain"])
        self.state = LinkState(saved["messages"], chain, saved["in_burst"], saved["last"])
        self.counts, self._counted = Counts(**saved["counts"]), saved["counted"]


def _to(lost: np.ndarray, device: torch.device) -> torch.Tensor:
    """A mask on a device, in a copy that the host does not wait for."""
    mask = torch.from_numpy(lost.copy())
    if device.type not in ("cpu", "meta"):
        mask = mask.pin_memory()
    return mask.to(device, non_blocking=True)
