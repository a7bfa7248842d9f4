# SPDX-License-Identifier: Apache-2.0
"""Dropout over real groups of 8 ranks: equal on copies, different on parts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from megatron.core.models.mimo.randomness import (
    ModuleRandomness,
    capture_states,
    restore_states,
    seed_everything,
)
from megatron.core.models.mimo.training.groups import create_process_groups, make_grid
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from tests.harness.backend import own_device
from tests.unit_tests.mimo.tiny_modules import COLOCATED, on_all_ranks

pytestmark = pytest.mark.ranks(8)


class Dropouts(torch.nn.Module):
    """One mask where activations are copies over TP, one where they are parts."""

    def forward(self) -> tuple[list[float], list[float]]:
        """(mask of a copy, mask of a part), 32 elements each."""
        ones = torch.ones(32, device=own_device())
        copies = torch.nn.functional.dropout(ones)
        with get_cuda_rng_tracker().fork():
            return copies.tolist(), torch.nn.functional.dropout(ones).tolist()


@pytest.fixture
def process_states() -> Iterator[None]:
    outside, on_host = capture_states(), torch.get_rng_state()
    seed_everything(1)
    yield
    torch.set_rng_state(on_host)
    restore_states(outside)


def test_masks_agree_over_tp_on_copies_only(process_states: None) -> None:
    grids = {name: make_grid(**sizes) for name, sizes in COLOCATED.items()}
    try:
        collections = {name: create_process_groups(grid) for name, grid in grids.items()}
        modules = {name: Dropouts() for name in grids}
        ModuleRandomness(modules, collections, seed=2)
        masks = {name: on_all_ranks(module()) for name, module in modules.items()}
        after = on_all_ranks(torch.rand(2, device=own_device()).tolist())
    finally:
        dist.barrier()
        for grid in grids.values():
            grid.destroy()
    for name, found in masks.items():
        places = [grids[name].coords(rank) for rank in range(8)]
        for one, other in itertools.combinations(range(8), 2):
            same_data = all(places[one][a] == places[other][a] for a in ("dp", "cp"))
            assert (found[one][0] == found[other][0]) is same_data, (name, one, other)
            assert found[one][1] != found[other][1], (name, one, other)
    assert all(i != j for i, j in zip(masks["images"], masks["language"], strict=True))
    # The process's own generator is untouched by the modules, which drew differently.
    assert after == [after[0]] * 8
