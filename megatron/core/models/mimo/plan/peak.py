# SPDX-License-Identifier: Apache-2.0
"""The peak of the accelerator that runs, where its data sheet is known."""

from __future__ import annotations

import re

from megatron.core.models.mimo.plan.machine import DATA_SHEETS

# What the driver calls those that the data sheets are of. H100 PCIe, H100 NVL and H200 NVL have the
# same chip at another clock and are not among them; all A100 have one peak.
_NAMES = {
    "a100": r"NVIDIA A100(-\S+| 80GB PCIe)",
    "h100": r"NVIDIA H100 80GB HBM3",
    "h200": r"NVIDIA H200",
    "b200": r"NVIDIA B200",
}


def peak_flops(device: str, dtype: str) -> float | None:
    """Return FLOPs a second of dense products at an accelerator's peak; None if not known.

    Args:
        device: its name, as ``torch.cuda.get_device_name`` says it.
        dtype: of the products; peaks are known of ``bfloat16`` and ``float16``, which are equal.

    >>> peak_flops("NVIDIA H100 80GB HBM3", "bfloat16")
    989500000000000.0
    >>> peak_flops("NVIDIA H100 PCIe", "bfloat16") is None
    True
    """
    if dtype not in ("bfloat16", "float16"):
        return None
    for name, pattern in _NAMES.items():
        if re.fullmatch(pattern, device):
            return DATA_SHEETS[name].flops
    return None
