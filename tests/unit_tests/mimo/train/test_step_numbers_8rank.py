# SPDX-License-Identifier: Apache-2.0
"""One reduction for all numbers of a step says what one for each would say."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.models.mimo.job.trainer import Runner, Trainer
from mimo_colocated.train.trainer import RecipeTrainer
from tests.harness.backend import own_device

pytestmark = pytest.mark.ranks(8)
AXES = ["tp", "cp", "dp", "pp"]


@pytest.mark.parametrize("shape", [(2, 1, 2, 2), (2, 2, 2, 1), (1, 1, 1, 8)])
def test_loss_tokens_and_the_longest_wait(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    grid, rank = HyperCommGrid(list(shape), AXES), dist.get_rank()
    groups = {"tp": "tp", "pp": "pp", "dp_cp": ["cp", "dp"]}
    made = {name: grid.create_pg(dims) for name, dims in groups.items()}
    runner: Any = SimpleNamespace(groups=SimpleNamespace(**made), device=own_device())
    runner.from_last_stage = lambda value: Runner.from_last_stage(runner, value)
    at = grid.coords(rank)
    last = at["pp"] == grid.dim_size("pp") - 1
    # TP ranks have the same, stages before the last have none.
    numbers = [0.1 + at["dp"] + 10 * at["cp"], 7 + at["cp"]]
    own = torch.tensor(numbers, dtype=torch.float64, device=own_device()) * last
    calls: list[Any] = []
    reduce = dist.all_reduce

    def counted(*given: Any, **named: Any) -> Any:
        calls.append(given)
        return reduce(*given, **named)

    for broken in (None, 7):
        mine = own * (math.nan if rank == broken else 1)
        data = runner._data = SimpleNamespace(waited_s=(rank * 3 % 8) / 10)
        expected = Trainer.summed(runner, mine.clone())
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(dist, "all_reduce", counted)
            found = RecipeTrainer.summed(runner, mine.clone())
        assert len(calls) == 1
        assert data.waited_s == 0.7
        if broken is None:
            assert found == pytest.approx(expected, rel=1e-14)
        else:
            assert all(map(math.isnan, found))  # on every rank, whoever had it
    grid.destroy()
