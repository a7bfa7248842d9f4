# SPDX-License-Identifier: Apache-2.0
"""Whole layouts on 8 ranks: with plans and lengths ahead no rank's host waits for its device.

TP, CP and sequence parallelism with two encoders; and a step in pipeline stages, apart from
Megatron's own ``torch.cuda.synchronize`` in its exchange between stages, which no CPU has.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.harness.host_waits import Wait
from tests.unit_tests.mimo.digits_runs import SIZE
from tests.unit_tests.mimo.waiting_cases import CASES, Case, watched

pytestmark = pytest.mark.ranks(8)

LAYOUTS = ("tp=2,dp=4", "tp=2,cp=2,dp=2")
STAGES = ("tp=2,dp=4", "tp=1,cp=2,pp=2,dp=2")


@pytest.mark.parametrize("name", ["two encoders packed", "mrope packed", "text only"])
def test_with_plans_ahead_nobody_waits(name):
    with watched(CASES[name], LAYOUTS, sequence_parallel=True) as model:
        model.run()
        found = [str(each) for each in model.run() if isinstance(each, Wait)]
        assert found == []


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_nor_in_a_step_of_stages(packed):
    """But once in the first one, of all microbatches together."""
    size = replace(SIZE, language_layers=2)
    with watched(Case(packed=packed), STAGES, varied_lengths=False, size=size) as model:
        trainer, device = model.trainer, model.device
        trainer.model.config.finalize_model_grads_func = None  # once per step
        counts = []
        for _ in range(2):
            device.host_waits.clear()
            with device.watch():
                microbatches = (model.inputs(number, 2) for number in range(2))
                trainer.schedule(microbatches, 2)
            counts.append([str(each) for each in device.host_waits if isinstance(each, Wait)])
        assert counts[1] == []
        assert counts[0]
