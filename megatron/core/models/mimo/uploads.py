# SPDX-License-Identifier: Apache-2.0
"""Copies between the host and a device beside the host's work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

_ON_HOST = ("cpu", "meta")


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor on a device; from the host by a copy that nobody waits for."""
    if tensor.device.type == "cpu" and device.type not in _ON_HOST:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class Download:
    """Copies of tensors on the host: started here, waited for in :meth:`arrive`, all at once.

    A device copies when what it was given before is done, so work that it is given in between keeps
    it busy while the host waits.

    Args:
        tensors: on any device; what is on the host is not copied.

    Attributes:
        on_host: whether all are there already.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        # Into page-locked memory, which PyTorch takes for copies that are not waited for.
        self._copies = [
            each if each.device.type in _ON_HOST else each.to("cpu", non_blocking=True)
            for each in tensors
        ]
        devices = {each.device for each in tensors if each.device.type not in _ON_HOST}
        self._events: list[Any] = [
            torch.get_device_module(device).current_stream(device).record_event()
            for device in devices
        ]
        self.on_host = not devices

    def arrive(self) -> list[torch.Tensor]:
        """Wait for the copies; on the host alone there is nothing to wait for."""
        for event in self._events:
            event.synchronize()
        return self._copies
