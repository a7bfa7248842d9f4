# SPDX-License-Identifier: Apache-2.0
"""The module is ``mimo.checkpoint.store``; this older path leads to it."""

import sys

from megatron.core.models.mimo.checkpoint import store

sys.modules[__name__] = store
