# SPDX-License-Identifier: Apache-2.0
"""The module is ``mimo.memory.layer_recompute``; this older path leads to it."""

import sys

from megatron.core.models.mimo.memory import layer_recompute

sys.modules[__name__] = layer_recompute
