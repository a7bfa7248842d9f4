# SPDX-License-Identifier: Apache-2.0
"""The module is ``mimo.comm.gather_bridge``; this older path leads to it."""

import sys

from megatron.core.models.mimo.comm import gather_bridge

sys.modules[__name__] = gather_bridge
