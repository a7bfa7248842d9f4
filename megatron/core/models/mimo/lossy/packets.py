# SPDX-License-Identifier: Apache-2.0
"""Which elements of a tensor travel in which packet.

A message is one tensor on its way from one rank. Its elements, in memory order, are cut in packets
of a fixed payload; the last one may be shorter. No packet is empty, and none splits an element.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

# Ethernet's 1500 bytes, less the headers of IP, UDP and a little of one's own.
PAYLOAD = 1450


def elements_per_packet(payload: int, itemsize: int) -> int:
    """Return how many whole elements fit in a packet.

    Args:
        payload: bytes of data per packet.
        itemsize: bytes per element.

    Raises:
        ValueError: not even one fits.
    """
    check_payload(payload)
    if payload < itemsize:
        raise ValueError(
            f"a packet of {payload} bytes holds no element of {itemsize} bytes; "
            f"give a payload of at least {itemsize}"
        )
    return payload // itemsize


def check_payload(payload: int) -> None:
    """Refuse a payload that is no positive number of bytes.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(payload, int) or payload < 1:
        raise ValueError(f"payload must be a whole number of bytes, 1 or more, got {payload!r}")


def count_packets(elements: int, per_packet: int) -> int:
    """Return the number of packets of a message; a message without elements has none."""
    return -(-elements // per_packet)


def packet_sizes(elements: int, per_packet: int) -> list[int]:
    """Return the number of elements in each packet of a message."""
    whole, rest = divmod(elements, per_packet)
    return [per_packet] * whole + [rest] * (rest > 0)


def element_mask(lost: torch.Tensor, shape: Sequence[int], per_packet: int) -> torch.Tensor:
    """Return which elements of a message are lost, bool of ``shape``.

    Args:
        lost: ``(packets,)`` bool, on the device where the mask is wanted.
        shape: of the message.
        per_packet: elements per packet.

    Raises:
        ValueError: another number of packets than the message has.
    """
    elements = math.prod(shape)
    packets = count_packets(elements, per_packet)
    if tuple(lost.shape) != (packets,):
        raise ValueError(
            f"a message of shape {tuple(shape)} has {packets} packets of {per_packet} elements, "
            f"got a mask of shape {tuple(lost.shape)}; make the mask for this message"
        )
    each = lost.unsqueeze(1).expand(packets, per_packet).reshape(-1)
    return each[:elements].reshape(tuple(shape))
