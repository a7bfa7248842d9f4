# SPDX-License-Identifier: Apache-2.0
"""What ranks describe, put together: pure. On ranks: ``test_checkpoint_pipeline_8rank.py``."""

from __future__ import annotations

import doctest

from megatron.core.models.mimo.checkpoint import global_tensors


def test_docstring_examples() -> None:
    outcome = doctest.testmod(global_tensors)
    assert (outcome.failed, outcome.attempted) == (0, 2)
