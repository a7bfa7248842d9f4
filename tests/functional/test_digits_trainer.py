# SPDX-License-Identifier: Apache-2.0
"""What the digits job's trainer leaves behind, on two ranks."""

from __future__ import annotations

import gc
import weakref

import pytest

from tests.unit_tests.mimo.digits_runs import run

pytestmark = pytest.mark.ranks(2)


@pytest.mark.parametrize("distributed_optimizer", [False, True])
def test_a_model_that_nobody_needs_is_collected(distributed_optimizer: bool) -> None:
    """Otherwise its memory and its groups, with a thread for each on gloo, stay for good."""
    with run(("tp=1,dp=2", "tp=2,cp=1,dp=1"), distributed_optimizer) as made:
        made.train(0, 1)
        model = weakref.ref(made.built.model)
    assert model() is not None
    del made
    gc.collect()
    assert model() is None
