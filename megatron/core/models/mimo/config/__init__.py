# SPDX-License-Identifier: Apache-2.0
"""What a multimodal model is made of, and which part of it a rank runs."""

from megatron.core.models.mimo.config.base_configs import MimoModelConfig
from megatron.core.models.mimo.config.role import ModuleStageInfo, RankRole

__all__ = ["MimoModelConfig", "ModuleStageInfo", "RankRole"]
