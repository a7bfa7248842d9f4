# SPDX-License-Identifier: Apache-2.0
"""The image modality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from megatron.core.models.mimo.submodules.base import ModalitySubmodules, refuse_many_projections


class VisionModalitySubmodules(ModalitySubmodules):
    """Encoders for image data with at most one projection into, and one out of, language space.

    Raises:
        ValueError: more than one input or output projection; what the base class refuses.
    """

    def __init__(
        self,
        encoders: Mapping[str, nn.Module] | None = None,
        decoders: Mapping[str, nn.Module] | None = None,
        input_projections: Sequence[nn.Module] | None = None,
        output_projections: Sequence[nn.Module] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            encoders=encoders,
            decoders=decoders,
            input_projections=input_projections,
            output_projections=output_projections,
            **kwargs,
        )
        refuse_many_projections(self)

    def decode(self, embeddings: torch.Tensor, data_batch: dict[str, Any]) -> torch.Tensor:
        """Not available: this project encodes image data, it does not generate it.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("Decoding to image data is not implemented")
