# SPDX-License-Identifier: Apache-2.0
"""The module is ``mimo.comm.plan.routes``; this older path leads to it."""

import sys

from megatron.core.models.mimo.comm.plan import routes

sys.modules[__name__] = routes
