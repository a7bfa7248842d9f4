# SPDX-License-Identifier: Apache-2.0
"""The module is ``mimo.gradients.finalize``; this older path leads to it."""

import sys

from megatron.core.models.mimo.gradients import finalize

sys.modules[__name__] = finalize
