# SPDX-License-Identifier: Apache-2.0
"""fp16: gradients that are not finite on one rank of one module, and what all ranks do then."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from examples.mimo.digits.data import DigitsBatches
from megatron.core.models.mimo.optimizer import MimoOptimizer, get_mimo_optimizer
from megatron.core.models.mimo.training.inner_optimizers import dynamic_scalers
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.grad_scaler import DynamicGradScaler
from tests.unit_tests.mimo.digits_runs import BATCH, FAN_IN, Run, run, same
from tests.unit_tests.mimo.tiny_modules import (
    COLOCATED,
    DISJOINT,
    TinyModel,
    on_all_ranks,
    tiny_model,
    values,
)

pytestmark = pytest.mark.ranks(8, timeout=90)

SCALING = {"initial_scale": 64.0, "growth_interval": 3, "hysteresis": 2, "min_scale": 8.0}
# The module that has them, or none. Hysteresis, growth, backing off and the smallest scale.
STEPS = [None, "images", None, "language", "images", "language", None, None, None, "images", None]
STEPS += ["language", "images", "images", "language", None]


def optimizer_of(model: TinyModel, distributed: bool) -> MimoOptimizer:
    config = OptimizerConfig(
        optimizer="adam",
        lr=0.1,
        clip_grad=0.0,
        fp16=True,
        params_dtype=torch.float16,
        use_distributed_optimizer=distributed,
        initial_loss_scale=SCALING["initial_scale"],
        min_loss_scale=SCALING["min_scale"],
        loss_scale_window=SCALING["growth_interval"],
        hysteresis=SCALING["hysteresis"],
    )
    return get_mimo_optimizer(model, config)


def scales(optimizer: MimoOptimizer) -> set[float]:
    """Of all modules on all ranks."""
    mine = [float(scaler.scale) for scaler in dynamic_scalers(optimizer._active_optimizers)]
    assert len(mine) == len(optimizer._active_optimizers)
    return {scale for each in on_all_ranks(mine) for scale in each}


def ranks_that_hold(optimizer: MimoOptimizer, name: str) -> list[int]:
    """Ranks with some of a module's optimizer: sharded over DP, most hold only padding."""
    inner = optimizer.module_infos[name].optimizer
    held = inner is not None and any(p.numel() for p in inner.get_parameters())
    return [rank for rank, answer in enumerate(on_all_ranks(held)) if answer]


@pytest.mark.parametrize("distributed", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize("layouts", [COLOCATED, DISJOINT], ids=["colocated", "disjoint"])
def test_one_rank_of_one_module_decides_for_all(layouts: dict, distributed: bool) -> None:
    """The scale goes as Megatron-Core's own scaler goes that is told of every such step."""
    stock = DynamicGradScaler(growth_factor=2.0, backoff_factor=0.5, **SCALING)
    with tiny_model(layouts, distributed=distributed, dtype=torch.float16) as model:
        optimizer = optimizer_of(model, distributed)
        holders = {name: ranks_that_hold(optimizer, name) for name in ("images", "language")}
        for step, broken in enumerate(STEPS, start=1):
            scale = float(stock.scale)
            whole = {
                name: {key: scale * value for key, value in values(name, step).items()}
                for name in ("images", "language")
            }
            model.set_gradients(whole)
            if broken and dist.get_rank() == holders[broken][-1]:
                for name, _, parameter in model.named():
                    if name == broken:
                        parameter.main_grad.fill_(float("inf") if step % 2 else float("nan"))
            before = model.weights()
            outcomes = on_all_ranks(optimizer.step())
            stock.update(broken is not None)
            assert scales(optimizer) == {float(stock.scale)}
            stayed = [same(model.weights(), before)]
            if broken:
                assert outcomes == [(False, None, None)] * 8
                assert on_all_ranks(stayed) == [[True]] * 8
            else:
                # Unscaled by the scale of the step, not by another one.
                squares = [v.square().sum() for n in whole for v in values(n, step).values()]
                norm = float(torch.stack(squares).sum().sqrt())
                assert all(success for success, _, _ in outcomes)
                assert [found for _, found, _ in outcomes] == pytest.approx([norm] * 8, rel=1e-6)
                assert on_all_ranks(stayed) == [[False]] * 8
    # All that can happen to a scale has happened.
    assert float(stock.scale) == SCALING["min_scale"]


def broken_step(one: Run, step: int, part: str) -> bool:
    """A step in which backward makes an inf on rank 3, in the first weight of a module."""
    name, parameter = next(
        (n, p) for n, p in one.built.model.named_parameters() if n.startswith(part)
    )
    assert parameter.requires_grad, name
    handle = parameter.register_hook(
        lambda gradient: gradient * float("inf") if dist.get_rank() == 3 else gradient
    )
    before, schedule = one.weights(), one.trainer.scheduler.num_steps
    result = one.trainer.step(DigitsBatches(7, "train", BATCH), step)
    handle.remove()
    assert same(one.weights(), before)
    assert one.trainer.scheduler.num_steps == schedule
    # A scale that can still be lowered is no reason to give up.
    assert result.scaling
    assert f"gradients of {'language' if part == 'language_model' else 'images'} " in result.problem
    return result.success


def test_skipped_steps_of_a_model_and_its_checkpoints(shared_tmp_path: Path) -> None:
    """An encoder that starts fresh from a checkpoint takes the scale of the language model."""
    fp16 = {"dtype": torch.float16}
    with run(FAN_IN, freeze="encoder+projector", **fp16) as first:
        first.train(0, 1)
        # Megatron-Core's hysteresis of two.
        assert on_all_ranks(broken_step(first, 1, "language_model")) == [False] * 8
        assert scales(first.trainer.optimizer) == {256.0}
        assert on_all_ranks(broken_step(first, 1, "language_model")) == [False] * 8
        assert scales(first.trainer.optimizer) == {128.0}
        first.save(first.store(shared_tmp_path), 1)
    with run(FAN_IN, seed=6, **fp16) as second:
        second.load(second.store(shared_tmp_path), 1)
        assert scales(second.trainer.optimizer) == {128.0}
        second.train(1, 2)
        assert on_all_ranks(broken_step(second, 2, "modality_submodules")) == [False] * 8
        # No hysteresis is left: that is part of the state, too.
        assert scales(second.trainer.optimizer) == {64.0}
        second.train(2, 4)
        assert scales(second.trainer.optimizer) == {64.0}
