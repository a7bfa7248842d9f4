# SPDX-License-Identifier: Apache-2.0
"""``TokenRows`` is :class:`.token_positions.TokenPositions`; this older path leads to it."""

from megatron.core.models.mimo.model.token_positions import TEXT, fill_places
from megatron.core.models.mimo.model.token_positions import TokenPositions as TokenRows

__all__ = ["TEXT", "TokenRows", "fill_places"]
