# SPDX-License-Identifier: Apache-2.0
"""What a pipelined step is asked before it begins, at every bound. Pure."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest

from megatron.core.hyper_comm_grid import GridShape
from megatron.core.models.mimo.config.role import ModuleLayout
from megatron.core.models.mimo.pipeline.checks import check_step
from tests.unit_tests.mimo.model_stubs import StubGroup


def step(
    microbatches: int, ahead: int | None = None, chunks: int = 1, pp: int = 2, **settings: Any
) -> None:
    config = {"batch_p2p_comm": False, "variable_seq_lengths": False, **settings}
    grids = {"language": GridShape((1, 2, 1), ("tp", "pp", "dp"))}
    model: Any = SimpleNamespace(
        config=SimpleNamespace(**config),
        role=SimpleNamespace(mode=ModuleLayout.COLOCATED),
        modality_submodules={},
        colocated_comms={},
        mimo_config=SimpleNamespace(module_to_grid_map=grids),
        language_stages=lambda: [None] * chunks,
    )
    groups: Any = SimpleNamespace(pp=StubGroup(pp))
    check_step(model, microbatches, groups, ahead)


VIRTUAL = "needs one stage per rank, this language model has 2 virtual ones"
TWO = "An interleaved pipeline of 2 ranks"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"microbatches": 1}, None),
        ({"microbatches": 0}, "num_microbatches must be 1 or more, got 0"),
        ({"microbatches": 4, "ahead": 1}, None),
        ({"microbatches": 4, "ahead": 0}, "encode_ahead must be 1 or more microbatches, got 0"),
        ({"microbatches": 4, "ahead": 5}, None),
        # All of a step, said in so many words, is what virtual stages need.
        ({"microbatches": 4, "ahead": 4, "chunks": 2}, None),
        ({"microbatches": 4, "ahead": 5, "chunks": 2}, None),
        ({"microbatches": 4, "chunks": 2}, None),
        ({"microbatches": 4, "ahead": 3, "chunks": 2}, VIRTUAL),
        ({"microbatches": 4, "chunks": 2, "batch_p2p_comm": True}, f"{TWO} sends two tensors"),
        ({"microbatches": 4, "chunks": 2, "variable_seq_lengths": True}, f"{TWO} cannot tell"),
        ({"microbatches": 4, "batch_p2p_comm": True, "variable_seq_lengths": True}, None),
        ({"microbatches": 4, "pp": 4}, "has 4 pipeline stages, the language grid 2"),
        ({"microbatches": 4, "pp": 4, "chunks": 2, "batch_p2p_comm": True}, "has 4 pipeline"),
    ],
    ids=str,
)
def test_bounds_of_a_step(given: dict[str, Any], message: str | None) -> None:
    fine = contextlib.nullcontext()
    with fine if message is None else pytest.raises(ValueError, match=message):
        step(**given)
