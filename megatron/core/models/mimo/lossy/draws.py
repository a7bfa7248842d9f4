# SPDX-License-Identifier: Apache-2.0
"""Random numbers of a link: functions of (key, message, purpose), and of nothing else.

A counter-based generator (Philox) needs no state between messages. So a message that is sent again
by a recomputed layer meets the same losses, whatever was sent between, and the generators of the
model are never touched. Numbers are made on the host: the same ones for every device.
"""

from __future__ import annotations

import numpy as np

from megatron.core.models.mimo.randomness import derive_seed

# Purposes below this one belong to transmissions: two for each.
START = 2**40


def stream_key(seed: int, stream: str, sender: int | str) -> int:
    """Return the 126-bit key of a stream of messages.

    Args:
        seed: the run's.
        stream: which link it is: the name of a place and a direction.
        sender: the rank, or what stands for several that lose the same packets.
    """
    high, low = (derive_seed(seed, "lossy link", stream, sender, part) for part in ("high", "low"))
    return high << 63 | low


class Draws:
    """The random numbers of one message.

    Args:
        key: of the link, see :func:`stream_key`.
        message: how many messages the link has sent before.
    """

    def __init__(self, key: int, message: int) -> None:
        self.key, self.message = key, message

    def uniform(self, purpose: int, count: int) -> np.ndarray:
        """Return ``(count,)`` numbers in [0, 1) with 53 random bits; the same at every call."""
        # The two low words count blocks within a purpose.
        bits = np.random.Philox(key=self.key, counter=[0, 0, purpose, self.message])
        return (bits.random_raw(count) >> np.uint64(11)) * 2.0**-53
