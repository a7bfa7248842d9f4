# SPDX-License-Identifier: Apache-2.0
"""The multimodal model."""

from megatron.core.models.mimo.model.base import MimoModel

__all__ = ["MimoModel"]
