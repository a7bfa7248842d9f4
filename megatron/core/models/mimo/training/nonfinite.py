# SPDX-License-Identifier: Apache-2.0
"""The module is ``mimo.gradients.nonfinite``; this older path leads to it."""

import sys

from megatron.core.models.mimo.gradients import nonfinite

sys.modules[__name__] = nonfinite
