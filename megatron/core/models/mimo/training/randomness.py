# SPDX-License-Identifier: Apache-2.0
"""The module is ``mimo.randomness``; this older path leads to it."""

import sys

from megatron.core.models.mimo import randomness

sys.modules[__name__] = randomness
