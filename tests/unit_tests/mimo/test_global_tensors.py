# SPDX-License-Identifier: Apache-2.0
"""What ranks describe, put together: pure. On ranks: ``test_checkpoint_pipeline_8rank.py``."""

from __future__ import annotations

import doctest

import pytest

from megatron.core.models.mimo.checkpoint import global_tensors


def test_docstring_examples() -> None:
    outcome = doctest.testmod(global_tensors)
    assert (outcome.failed, outcome.attempted) == (0, 2)


@pytest.mark.parametrize("other", [([8, 2], 4), ([4], 4), ([4, 2], 2)], ids=str)
def test_stages_that_describe_a_tensor_differently_are_refused(other: tuple) -> None:
    """By its shape or by its dtype, whichever rank says it first."""
    for parts in ({0: ([4, 2], 4), 3: other}, {0: other, 3: ([4, 2], 4)}):
        described = {rank: {"a": ([1], 4), "w": each} for rank, each in parts.items()}
        with pytest.raises(ValueError, match=r"'w' is .* on rank 0 and .* on rank 3; build all"):
            global_tensors.joined(described)
