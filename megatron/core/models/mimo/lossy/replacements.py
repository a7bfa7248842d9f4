# SPDX-License-Identifier: Apache-2.0
"""What stands in the place of a lost packet.

| name            | a lost element becomes                | elements that arrived    |
|-----------------|---------------------------------------|--------------------------|
| ``zero``        | 0                                     | as they are              |
| ``stale``       | what last arrived in its place, or 0  | as they are              |
| ``rescaled``    | 0                                     | times packets / arrived  |
| ``retransmitted`` | what it is: it is sent until it arrives | as they are          |

``rescaled`` keeps the expected value where all packets are lost alike: over all masks with equally
many losses the mean is the message itself. A message of which nothing arrives is 0.

No input is written; results have its dtype and device. ``lost`` is bool, in the message's shape.
"""

from __future__ import annotations

import numpy as np
import torch

from megatron.core.models.mimo.lossy.draws import Draws
from megatron.core.models.mimo.lossy.loss_models import ChainState, LossModel

REPLACEMENTS = ("zero", "stale", "rescaled", "retransmitted")


def zero(x: torch.Tensor, lost: torch.Tensor) -> torch.Tensor:
    """Return ``x`` with zeros in the place of what was lost."""
    return x.masked_fill(lost, 0)


def stale(x: torch.Tensor, lost: torch.Tensor, last: torch.Tensor | None) -> torch.Tensor:
    """Return ``x`` with what arrived last in the place of what was lost.

    Args:
        x: the message.
        lost: which elements are.
        last: what came out for the message before; None, or another shape, means zeros.
    """
    if last is None or last.shape != x.shape or last.dtype != x.dtype:
        return zero(x, lost)
    return torch.where(lost, last, x)


def rescaled(x: torch.Tensor, lost: torch.Tensor, packets: int, arrived: int) -> torch.Tensor:
    """Return ``x`` with zeros for what was lost and the rest times ``packets / arrived``."""
    kept = zero(x, lost)
    return kept * (packets / arrived) if arrived else kept


def resend(
    model: LossModel, lost: np.ndarray, state: ChainState, draws: Draws
) -> tuple[int, int, ChainState]:
    """Send lost packets again, those of a round together, until all have arrived.

    Args:
        model: loses some of them again.
        lost: of the first transmission, ``(packets,)`` bool.
        state: of the chain after it.
        draws: the message's numbers.

    Returns:
        Packets that were sent again, counted as often as they were; rounds; the state after.
    """
    sent = rounds = 0
    left = int(lost.sum())
    while left:
        rounds, sent = rounds + 1, sent + left
        outcome = model.send(left, state, draws, 2 * rounds)
        left, state = int(outcome.lost.sum()), outcome.after
    return sent, rounds, state


def check_replacement(name: str, model: LossModel) -> None:
    """Refuse an unknown name, and packets that would be sent for ever.

    Raises:
        ValueError: either of them.
    """
    if name not in REPLACEMENTS:
        raise ValueError(f"replacement must be one of {REPLACEMENTS}, got {name!r}")
    if name == "retransmitted" and model.may_stay_lost:
        raise ValueError(
            f"{model} may lose a packet however often it is sent; with replacement="
            "'retransmitted' some must arrive in the end: give a smaller loss"
        )
