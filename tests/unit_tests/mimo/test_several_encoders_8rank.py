# SPDX-License-Identifier: Apache-2.0
"""Two encoders with layouts of their own beside one language model, on 8 ranks.

Images on TP2 DP4, sounds on TP1 DP8, language model on TP2 CP2 DP2 with SP. Each sample has any
number of either, none among them; the first microbatch is without images, the last one without
sounds, and one between them without either. The oracle is the same
model on one rank, fed all samples; initial weights do not depend on the layout. Gradients are
compared before the optimizer, and what the optimizer says of their norm.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.models.mimo import (
    AudioModalitySubmodules,
    MimoModel,
    MimoModelConfig,
    VisionModalitySubmodules,
)
from megatron.core.models.mimo.gradients.finalize import (
    MimoGradFinalizer,
    iter_modules,
    wrap_modules_with_ddp,
)
from megatron.core.models.mimo.optimizer import get_mimo_optimizer
from megatron.core.models.mimo.training.groups import create_process_groups, make_grid
from megatron.core.models.mimo.training.initial_weights import initialize_weights
from megatron.core.optimizer import OptimizerConfig
from megatron.core.pipeline_parallel.schedules import forward_backward_no_pipelining
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from mimo_colocated.launch.layouts import Layout
from tests.models.encoders import VISION, encoder_spec
from tests.models.model import ModelOptions, language_specs, transformer_configs
from tests.parity.compare import GRADIENTS, tensor_checks, worst_by_kind
from tests.parity.tensors import complete_gradients, local_gradients, whole_tensors
from tests.unit_tests.mimo.digits_runs import SIZE

pytestmark = pytest.mark.ranks(8)

ENCODERS = {"images": VisionModalitySubmodules, "sounds": AudioModalitySubmodules}
LANGUAGE, LENGTH, ROWS = "language", 32, 4
SPECIAL = {"images": 4, "sounds": 40}
# Items of each of the 8 samples, per microbatch. In the second one an encoder replica of either
# modality has nothing to encode.
COUNTS = (
    {"images": (0,) * 8, "sounds": (0, 1, 0, 0, 2, 0, 0, 0)},
    {"images": (2, 0, 1, 3, 0, 2, 0, 0), "sounds": (1, 0, 2, 0, 3, 1, 0, 1)},
    {"images": (0,) * 8, "sounds": (0,) * 8},
    {"images": (0, 1, 0, 0, 0, 0, 1, 2), "sounds": (0,) * 8},
)


@dataclass
class Built:
    """A model on its grids, ready to train."""

    model: MimoModel
    grids: dict[str, Any]
    groups: dict[str, Any]
    optimizer: Any

    def release(self) -> None:
        """Destroy all groups."""
        dist.barrier()
        self.model.destroy()
        for grid in self.grids.values():
            grid.destroy()


def build(layouts: dict[str, Layout], device: torch.device, rank_offset: int = 0) -> Built:
    grids = {
        name: make_grid(tp=each.tp, cp=each.cp, dp=each.dp, rank_offset=rank_offset)
        for name, each in layouts.items()
    }
    groups = {name: create_process_groups(grid) for name, grid in grids.items()}
    options = ModelOptions(size=SIZE, sequence_parallel=True)
    configs, specs = {}, {}
    model_parallel_cuda_manual_seed(1, tp_rank=groups[LANGUAGE].tp.rank(), ep_rank=0, etp_rank=0)
    for name, module in ENCODERS.items():
        made = transformer_configs(layouts[name], layouts[LANGUAGE], options)
        specs[name] = encoder_spec(VISION, made, groups[name])
        specs[name].module = module
        configs[name], configs[LANGUAGE] = made["images"], made[LANGUAGE]
    (language_spec,) = language_specs(configs[LANGUAGE], groups[LANGUAGE], options)
    config = MimoModelConfig(
        language_model_spec=language_spec,
        modality_submodules_spec=specs,
        special_token_ids=SPECIAL,
        module_to_grid_map=grids,
    )
    language = groups[LANGUAGE]
    model = MimoModel(config, cp_group=language.cp, tp_group=language.tp).to(device)
    for name, module in iter_modules(model):
        initialize_weights(module, 7, name_prefix=f"{name}.", tp_group=groups[name].tp)
    overlaps = {"overlap_grad_reduce": True, "overlap_param_gather": True}
    sharded = {"use_distributed_optimizer": True}
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, **overlaps, **sharded)
    wrap_modules_with_ddp(model, configs, ddp, groups)
    optimizer = get_mimo_optimizer(
        model,
        OptimizerConfig(optimizer="adam", lr=1e-2, clip_grad=0.5, weight_decay=0.0, **sharded),
    )
    model.config.finalize_model_grads_func = MimoGradFinalizer(groups)
    model.config.no_sync_func = model.no_sync
    scale_loss = weakref.WeakMethod(optimizer.scale_loss)  # see the example's Trainer
    model.config.grad_scale_func = lambda loss: scale_loss()(loss)
    return Built(model, grids, groups, optimizer)


def microbatch(number: int, shares: dict[str, tuple[int, int]], device: torch.device) -> dict:
    """A rank's part: ``shares`` has (index, parts) of the 8 samples for every module."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(5, 20, (8, LENGTH), generator=generator, device="cpu")
    ids[:, 0], counts = 1, COUNTS[number]
    for sample in range(8):
        column = 1
        # Sounds first in odd samples: rows of both kinds are in any order in a sequence.
        for name in sorted(ENCODERS, reverse=bool(sample % 2)):
            for _ in range(counts[name][sample]):
                ids[sample, column : column + ROWS] = SPECIAL[name]
                column += ROWS + 1
    part = {name: slice(8 // n * i, 8 // n * (i + 1)) for name, (i, n) in shares.items()}
    inputs = {}
    for seed, name in enumerate(ENCODERS):
        pixels = torch.Generator().manual_seed(100 * number + seed)
        every = torch.rand(sum(counts[name]), 1, 8, 8, generator=pixels, device="cpu") * 2 - 1
        first = sum(counts[name][: part[name].start])
        mine = every[first : first + sum(counts[name][part[name]])].to(device)
        inputs[name] = {"digits": {"images": mine}} if len(mine) else None
    ids = ids[part[LANGUAGE]].to(device)
    return {
        "input_ids": ids,
        "position_ids": torch.arange(LENGTH, device=device).expand_as(ids),
        "labels": (ids * 7 + 3) % 64,
        "loss_mask": (ids % 3 > 0).float(),
        "modality_inputs": inputs,
    }


def forward_step(data: Iterator[dict], model: MimoModel) -> tuple[torch.Tensor, Any]:
    losses, mask = model(**next(data))

    def loss_of(losses: torch.Tensor) -> tuple[torch.Tensor, ...]:
        loss, tokens = (losses * mask).sum(), mask.sum()
        return loss, tokens.to(torch.int), torch.stack([loss.detach(), tokens]).double()

    return losses, loss_of


def step(built: Built, device: torch.device) -> dict[str, Any]:
    """One training step over all microbatches: loss, gradients, the optimizer's norm of them."""
    shares = {name: (g.dp.rank(), g.dp.size()) for name, g in built.groups.items()}
    built.model.zero_grad_buffer()
    built.optimizer.zero_grad()
    outputs = forward_backward_no_pipelining(
        forward_step_func=forward_step,
        data_iterator=(microbatch(number, shares, device) for number in range(len(COUNTS))),
        model=[built.model],
        num_microbatches=len(COUNTS),
        seq_length=0,
        micro_batch_size=0,
        pg_collection=built.groups[LANGUAGE],
    )
    total = torch.stack(outputs).sum(0)
    dist.all_reduce(total, group=built.groups[LANGUAGE].dp_cp)
    complete_gradients(built.model)
    gradients = whole_tensors(built.model, built.groups, local_gradients(built.model))
    success, norm, _ = built.optimizer.step()
    assert success
    return {"loss": total.tolist(), "gradients": gradients, "norm": norm}


@pytest.mark.parametrize(
    ("images", "sounds", "language"),
    [
        (Layout(2, 1, 4), Layout(1, 1, 8), Layout(2, 2, 2)),
        (Layout(4, 1, 2), Layout(1, 1, 8), Layout(1, 2, 4)),
    ],
    ids=["both_fan_in", "fan_out_and_fan_in"],
)
def test_two_encoders_train_as_on_one_rank(images, sounds, language, rank_device):
    alone = build(dict.fromkeys((*ENCODERS, LANGUAGE), Layout()), rank_device, dist.get_rank())
    expected, later = step(alone, rank_device), step(alone, rank_device)
    alone.release()
    layouts = {"images": images, "sounds": sounds, LANGUAGE: language}
    built = build(layouts, rank_device)
    found, found_later = step(built, rank_device), step(built, rank_device)
    built.release()
    # fp32: one number each, summed over other ranks than the oracle's.
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    # Weights that a rank had not gathered would be a whole step of 1e-2 away; Adam's first step
    # moves elements whose gradient is rounding noise either way.
    assert found_later["loss"] == pytest.approx(later["loss"], rel=1e-4)
    assert later["loss"][0] < 0.99 * expected["loss"][0]
    whole = expected["gradients"]
    (worst,) = worst_by_kind(list(tensor_checks("gradients", found["gradients"], whole, GRADIENTS)))
    assert worst.passed, f"{worst.where}: {worst.error:.2e}"
    assert any(name.startswith("modality_submodules.sounds") for name in whole)
    assert all(grad.abs().sum() > 0 for grad in whole.values())
    # The optimizer alone on a rank would add up all ranks' copies of the oracle.
    norm = torch.stack([grad.double().norm() for grad in whole.values()]).norm().item()
    assert found["norm"] == pytest.approx(norm, rel=GRADIENTS)
