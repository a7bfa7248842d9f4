# SPDX-License-Identifier: Apache-2.0
"""What a pipelined step is asked before it begins, at every bound. Pure."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron.core.hyper_comm_grid import GridShape
from megatron.core.models.mimo.comm.plan.routed_layout import RouteLayout
from megatron.core.models.mimo.comm.routed_bridge import RoutedBridge
from megatron.core.models.mimo.config.role import ModuleLayout
from megatron.core.models.mimo.pipeline.checks import check_bubbles, check_step
from tests.unit_tests.mimo.model_stubs import StubGroup


def step(
    microbatches: int,
    ahead: int | None = None,
    chunks: int = 1,
    pp: int = 2,
    mode: ModuleLayout = ModuleLayout.COLOCATED,
    modalities: tuple[str, ...] = (),
    bridged: tuple[str, ...] = (),
    **settings: Any,
) -> None:
    config = {"batch_p2p_comm": False, "variable_seq_lengths": False, **settings}
    grids = {"language": GridShape((1, 2, 1), ("tp", "pp", "dp"))}
    model: Any = SimpleNamespace(
        config=SimpleNamespace(**config),
        role=SimpleNamespace(mode=mode),
        modality_submodules={name: torch.nn.Identity() for name in modalities},
        colocated_comms={(name, "language"): None for name in bridged},
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
        (
            {"microbatches": 4, "mode": ModuleLayout.NON_COLOCATED},
            "runs colocated models; modules on different ranks go over stock's multi-module",
        ),
        ({"microbatches": 4, "modalities": ("a", "b"), "bridged": ("a", "b")}, None),
        (
            {"microbatches": 4, "modalities": ("b", "a"), "bridged": ("a",)},
            r"needs a bridge for each modality \(\['a', 'b'\]\), the model has some for \['a'\]",
        ),
        ({"microbatches": 4, "pp": 4, "chunks": 2, "batch_p2p_comm": True}, "has 4 pipeline"),
    ],
    ids=str,
)
def test_bounds_of_a_step(given: dict[str, Any], message: str | None) -> None:
    fine = contextlib.nullcontext()
    with fine if message is None else pytest.raises(ValueError, match=message):
        step(**given)


def bubbles(
    count: int,
    *,
    microbatches: int = 8,
    pp: int = 2,
    ahead: int | None = None,
    chunks: int = 1,
    guard: str = "always",
    encoder: tuple[int, int] = (2, 2),
    routed: bool = True,
    part: Any = None,
) -> None:
    grids = (
        GridShape(encoder, ("tp", "dp")),
        GridShape((1, 4 // pp, pp), ("tp", "dp", "pp")),
    )
    bridge: Any = object.__new__(RoutedBridge) if routed else object()
    if routed:
        bridge.layout, bridge.guard = RouteLayout.from_grids(*grids), guard
    model: Any = SimpleNamespace(
        modality_submodules={"images": torch.nn.ModuleList([part or torch.nn.Linear(1, 1)])},
        colocated_comms={("images", "language"): bridge},
        language_stages=lambda: [None] * chunks,
    )
    check_bubbles(model, microbatches, SimpleNamespace(pp=StubGroup(pp)), ahead, count)


def part_with_experts() -> torch.nn.Module:
    part = torch.nn.Linear(1, 1)
    part.config = SimpleNamespace(expert_model_parallel_size=2)
    return part


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"count": 6}, None),
        ({"count": 4, "pp": 4, "encoder": (1, 4)}, None),
        ({"count": 0, "pp": 1, "routed": False}, None),
        ({"count": 7}, "the first stage begins with 2 before .*, so it can be 0 to 6$"),
        ({"count": 1, "microbatches": 1}, "so it can be 0 to 0$"),
        ({"count": -1}, "so it can be 0 to 6$"),
        ({"count": 1, "pp": 1}, "this language model has no pipeline stages; use encode_ahead"),
        ({"count": 1, "chunks": 2}, "this language model has virtual stages"),
        ({"count": 1, "ahead": 1}, "and encode_ahead=1 say both"),
        ({"count": 1, "routed": False}, "needs a routed bridge for each modality, 'images' has"),
        ({"count": 1, "guard": "first"}, "needs bridge_guard='always', got 'first'"),
        ({"count": 1, "encoder": (4, 1)}, "replica of 'images' has ranks on several pipeline st"),
        ({"count": 1, "pp": 4}, "replica of 'images' has ranks on several pipeline stages"),
        ({"count": 1, "part": part_with_experts()}, "with experts that they share out; use 0"),
    ],
    ids=str,
)
def test_what_can_be_encoded_in_bubbles(given: dict[str, Any], message: str | None) -> None:
    fine = contextlib.nullcontext()
    with fine if message is None else pytest.raises(ValueError, match=message):
        bubbles(**given)
