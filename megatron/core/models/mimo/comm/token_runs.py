# SPDX-License-Identifier: Apache-2.0
"""The module is ``mimo.comm.plan.token_runs``; this older path leads to it."""

import sys

from megatron.core.models.mimo.comm.plan import token_runs

sys.modules[__name__] = token_runs
