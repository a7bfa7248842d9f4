# SPDX-License-Identifier: Apache-2.0
"""The module is ``mimo.pipeline.step``; this older path leads to it."""

import sys

from megatron.core.models.mimo.pipeline import step

sys.modules[__name__] = step
