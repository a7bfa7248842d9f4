# SPDX-License-Identifier: Apache-2.0
"""Towers of the package that cut their items over CP, on real ranks, against whole items on one.

float64: the same sums in another order. SigLIP2 resizes its positions in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from megatron.core.models.mimo.comm.collectives import gather_blocks
from megatron.core.models.mimo.comm.plan.token_runs import split_items
from megatron.core.models.mimo.randomness import seed_everything
from megatron.core.models.mimo.towers.feature_transformer import Features
from megatron.core.models.mimo.towers.vision import ImageShape, ImageTower, PatchTower
from megatron.core.models.mimo.towers.whisper import WhisperEncoder
from megatron.core.models.mimo.training.groups import create_process_groups, make_grid
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from tests.harness.backend import own_device
from tests.unit_tests.mimo.tiny_modules import on_all_ranks

pytestmark = pytest.mark.ranks(4)

WORLD = 4


def tower_config(cp: int, **more: Any) -> TransformerConfig:
    return TransformerConfig(
        num_layers=2,
        hidden_size=16,
        num_attention_heads=4,
        normalization="LayerNorm",
        context_parallel_size=cp,
        add_qkv_bias=True,
        params_dtype=torch.float64,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        init_method_std=0.3,
        **more,
    )


def clip(config: TransformerConfig, groups: Any) -> nn.Module:
    return ImageTower(config, groups, ImageShape(6, 2), Features((2, 0), 1), clip=True)


def siglip(config: TransformerConfig, groups: Any) -> nn.Module:
    return ImageTower(config, groups, ImageShape(6, 2), Features((2,), final_norm=True), clip=False)


def siglip2(config: TransformerConfig, groups: Any) -> nn.Module:
    return PatchTower(config, groups, 12, 4, Features((2, 1), 1))


def whisper(config: TransformerConfig, groups: Any) -> nn.Module:
    return WhisperEncoder(config, groups, 5, 6)


def images() -> dict[str, torch.Tensor]:
    values = torch.linspace(-2, 3, 3 * 3 * 36, device=own_device()).double()
    return {"pixel_values": values.view(3, 3, 6, 6).sin()}


def patches() -> dict[str, torch.Tensor]:
    shapes = torch.tensor([[2, 3], [1, 1], [3, 3]], device=own_device())
    there = torch.arange(9, device=own_device()) < shapes.prod(-1)[:, None]
    values = torch.linspace(-2, 3, 3 * 9 * 12, device=own_device()).double().view(3, 9, 12).sin()
    return {"pixel_values": values, "pixel_attention_mask": there, "spatial_shapes": shapes}


def spectra() -> dict[str, torch.Tensor]:
    lengths = torch.tensor([12, 5], device=own_device())
    mask = (torch.arange(12, device=own_device()) < lengths[:, None]).long()
    values = torch.linspace(-2, 3, 2 * 5 * 12, device=own_device()).double().view(2, 5, 12).sin()
    return {"input_features": values, "feature_attention_mask": mask}


TOWERS = {
    "clip": (clip, images, [9, 9, 9]),
    "siglip": (siglip, images, [9, 9, 9]),
    "siglip2": (siglip2, patches, [5, 0, 8]),
    "whisper": (whisper, spectra, [6, 3]),
}


def own_rows(items: list[int], rank: int, cp: int) -> list[int]:
    """Rows of a CP rank by the rule."""
    bounds = [sum(items[:i]) for i in range(len(items))]
    parts = [split_items(n, cp)[rank] for n in items]
    return [first + k for first, part in zip(bounds, parts, strict=True) for k in part]


@contextmanager
def groups_of(tp: int, cp: int) -> Iterator[ProcessGroupCollection]:
    grid = make_grid(tp=tp, cp=cp, dp=WORLD // (tp * cp))
    seed_everything(1)
    yield create_process_groups(grid)
    dist.barrier()
    grid.destroy()


def run(
    name: str, groups: ProcessGroupCollection, sequence_parallel: bool = False
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Rows of this rank, and its gradients: their parts are not yet summed over TP and CP."""
    (build, inputs, items), tp, cp = TOWERS[name], groups.tp.size(), groups.cp.size()
    more = {"tensor_model_parallel_size": tp, "sequence_parallel": sequence_parallel}
    tower = build(tower_config(cp, **more), groups).to(own_device())
    generator = torch.Generator().manual_seed(3)
    for parameter in tower.parameters():
        cut, shape = getattr(parameter, "tensor_model_parallel", False), [*parameter.shape]
        dim = parameter.partition_dim if cut else 0
        shape[dim] *= tp if cut else 1
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64).to(own_device()) * 0.3
        parameter.data.copy_(drawn.chunk(tp, dim)[groups.tp.rank()] if cut else drawn)
    assert tower.cuts_items is True
    rows = tower(**inputs()).flatten(0, -2)
    weight = torch.linspace(-1, 1, sum(items) * rows.size(-1), device=own_device()).to(rows)
    own = weight.view(sum(items), -1)[own_rows(items, groups.cp.rank(), cp)]
    (rows * own).sum().backward()
    return rows.detach(), {
        key: whole_over_tp(parameter, groups.tp, sequence_parallel)
        for key, parameter in tower.named_parameters()
        if parameter.grad is not None
    }


def whole_over_tp(parameter: Any, group: Any, sequence_parallel: bool) -> torch.Tensor:
    """The gradient of the whole weight; under SP copies of a weight have parts of it."""
    if getattr(parameter, "tensor_model_parallel", False):
        return gather_blocks(parameter.grad, group, parameter.partition_dim)
    if sequence_parallel and getattr(parameter, "sequence_parallel", False):
        dist.all_reduce(parameter.grad, group=group)
    return parameter.grad


@pytest.mark.parametrize(
    ("cp", "tp", "sequence_parallel"),
    [(2, 1, False), (4, 1, False), (2, 2, False), (2, 2, True)],
    ids=["cp2", "cp4", "cp2-tp2", "cp2-tp2-sp"],
)
@pytest.mark.parametrize("name", list(TOWERS))
def test_rows_and_gradients_are_those_of_whole_items(
    name: str, cp: int, tp: int, sequence_parallel: bool
) -> None:
    exact = {"rtol": 1e-10, "atol": 1e-11}
    resized = {"rtol": 1e-5, "atol": 1e-5} if name == "siglip2" else exact
    with groups_of(1, 1) as alone:
        rows, gradients = run(name, alone)
    with groups_of(tp, cp) as groups:
        own, parts = run(name, groups, sequence_parallel)
        kept = own_rows(TOWERS[name][2], groups.cp.rank(), cp)
        torch.testing.assert_close(own, rows[kept], **exact)
        # The control: a rank's own gradient is a part only.
        key = next(key for key in gradients if key.endswith("linear_fc1.weight"))
        near = torch.allclose(parts[key], gradients[key], rtol=1e-3)
        for key, gradient in gradients.items():
            dist.all_reduce(parts[key], group=groups.cp)
            bound = resized if key == "position_embedding" else exact
            torch.testing.assert_close(
                parts[key], gradient, **bound, msg=lambda said, key=key: f"{key}: {said}"
            )
    assert not any(on_all_ranks(near))
