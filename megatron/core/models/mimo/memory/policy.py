# SPDX-License-Identifier: Apache-2.0
"""The choice, per modality, of what becomes of its activations while the language model runs."""

from __future__ import annotations

from dataclasses import dataclass

KEEP, RECOMPUTE, OFFLOAD = "keep", "recompute", "offload"
POLICIES = (KEEP, RECOMPUTE, OFFLOAD)


@dataclass(frozen=True)
class EncoderMemory:
    """What becomes of one modality's activations between its forward and its backward pass.

    ``"keep"``: they stay on the device. ``"recompute"``: only the part's input stays, and the part
    runs again in backward. ``"offload"``: they are copied to host memory and back.

    With both parts recomputed nothing but the encoders' inputs stays. With the encoder offloaded
    and the projector recomputed, the projector's input goes to the host with the encoder's.

    Attributes:
        encoder: of all that the encoders keep.
        projector: of the encoders' output and of all that the input projection keeps.
        offload_from: bytes of the smallest storage that is offloaded; below, a copy takes longer to
            start than to run.

    Raises:
        ValueError: an unknown policy, or a negative size.

    >>> EncoderMemory(encoder="offload").projector
    'keep'
    """

    encoder: str = KEEP
    projector: str = KEEP
    offload_from: int = 2**18

    def __post_init__(self) -> None:
        for part in ("encoder", "projector"):
            value = getattr(self, part)
            if value not in POLICIES:
                raise ValueError(f"EncoderMemory {part} must be one of {POLICIES}, got {value!r}")
        if self.offload_from < 0:
            raise ValueError(
                f"EncoderMemory offload_from must be 0 bytes or more, got {self.offload_from}"
            )

    def uses(self, policy: str) -> bool:
        """Return whether one of the parts has this policy."""
        return policy in (self.encoder, self.projector)
