# SPDX-License-Identifier: Apache-2.0
"""The module is ``mimo.comm.plan.routed_layout``; this older path leads to it."""

import sys

from megatron.core.models.mimo.comm.plan import routed_layout

sys.modules[__name__] = routed_layout
