# SPDX-License-Identifier: Apache-2.0
"""The module is ``mimo.comm.plan.gather_layout``; this older path leads to it."""

import sys

from megatron.core.models.mimo.comm.plan import gather_layout

sys.modules[__name__] = gather_layout
