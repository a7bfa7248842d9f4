# SPDX-License-Identifier: Apache-2.0
"""Gradients and outputs that are not finite, in every dtype: no step is made, somebody is named.

That fp16's loss scales follow them is for ``test_loss_scaling_8rank`` to say.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from megatron.core.models.mimo.gradients.finalize import iter_modules
from megatron.core.models.mimo.gradients.nonfinite import (
    NonFiniteGradients,
    find_nonfinite_gradients,
    gradients_sentence,
)
from megatron.core.models.mimo.optimizer import get_mimo_optimizer
from megatron.core.optimizer import OptimizerConfig
from tests.unit_tests.mimo.digits_runs import FAN_IN, Run, run, same
from tests.unit_tests.mimo.tiny_modules import (
    COLOCATED,
    DISJOINT,
    on_all_ranks,
    tiny_model,
    values,
)

pytestmark = pytest.mark.ranks(8, timeout=90)

NAMES = ("images", "language")
PREFIX = {"images": "modality_submodules.images.", "language": "language_model."}
DTYPES = {"float32": {}, "bfloat16": {"bf16": True}, "float16": {"fp16": True}}


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("layouts", [COLOCATED, DISJOINT], ids=["colocated", "disjoint"])
@pytest.mark.parametrize("distributed", [False, True], ids=["whole", "sharded"])
def test_the_step_is_skipped_everywhere_and_the_module_is_named(
    layouts: dict, distributed: bool, dtype: str
) -> None:
    """One rank's copy or shard of one module's gradient is enough, with and without clipping."""
    config = OptimizerConfig(
        optimizer="adam",
        lr=0.1,
        clip_grad=1.0 if distributed else 0.0,
        use_distributed_optimizer=distributed,
        params_dtype=getattr(torch, dtype),
        **DTYPES[dtype],
    )
    with tiny_model(layouts, distributed=distributed, dtype=getattr(torch, dtype)) as model:
        optimizer = get_mimo_optimizer(model, config)
        held = {
            name: any(p.numel() for p in info.optimizer.get_parameters())
            for name, info in optimizer.module_infos.items()
            if info.optimizer is not None
        }
        holders = on_all_ranks(held)
        scale = float(optimizer.get_loss_scale())
        for broken, value in [("images", math.nan), ("language", math.inf), (None, 0.0)]:
            gradients = {n: {k: scale * v for k, v in values(n, 1).items()} for n in NAMES}
            model.set_gradients(gradients)
            rank = max((r for r in range(8) if holders[r].get(broken)), default=None)
            if rank == dist.get_rank():
                for name, _, parameter in model.named():
                    if name == broken:
                        parameter.main_grad.fill_(value)
            before = model.weights()
            outcomes = on_all_ranks(optimizer.step())
            named = on_all_ranks((optimizer.nonfinite_modules, optimizer.nonfinite_gradients))
            stayed = on_all_ranks(same(model.weights(), before))
            scale = float(optimizer.get_loss_scale())
            assert all(each == named[0] for each in named)
            if broken is None:
                assert named[0] == ((), ())
                assert all(success for success, _, _ in outcomes)
                continue
            assert outcomes == [(False, None, None)] * 8
            assert stayed == [True] * 8
            parameters = tuple(PREFIX[broken] + key for key in ("whole", "sharded"))
            assert named[0] == (
                (broken,),
                (NonFiniteGradients(broken, rank, parameters, 2),),
            )


@pytest.mark.parametrize("name", NAMES)
def test_a_replica_that_is_not_the_one_that_speaks(name: str) -> None:
    """Replicas hold copies of one gradient; the last has a nan where the others have none."""
    with tiny_model(COLOCATED) as model:
        optimizer = get_mimo_optimizer(model, OptimizerConfig(optimizer="adam", lr=0.1))
        model.set_gradients({n: values(n, 1) for n in NAMES})
        for module, key, parameter in model.named():
            if dist.get_rank() == 7 and (module, key) == (name, "sharded"):
                parameter.main_grad[0, 0] = math.nan
        before = model.weights()
        outcomes = on_all_ranks((optimizer.step(), optimizer.nonfinite_modules))
        stayed = on_all_ranks(same(model.weights(), before))
    assert outcomes == [((False, None, None), (name,))] * 8
    assert stayed == [True] * 8


@pytest.mark.parametrize("distributed", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize("name", NAMES)
def test_a_copy_that_the_norm_leaves_out(name: str, distributed: bool) -> None:
    """Norms count what TP ranks have copies of on their first one only; here others have a nan."""
    settings = {"optimizer": "adam", "lr": 0.1, "use_distributed_optimizer": distributed}
    with tiny_model(COLOCATED, distributed=distributed) as model:
        optimizer = get_mimo_optimizer(model, OptimizerConfig(**settings))
        model.set_gradients({n: values(n, 1) for n in NAMES})
        second = model.collections[name].tp.rank() == 1
        for module, key, parameter in model.named():
            if second and (module, key) == (name, "whole"):
                parameter.main_grad[0] = math.nan
        before = model.weights()
        outcomes = on_all_ranks((optimizer.step(), optimizer.nonfinite_modules))
        stayed = on_all_ranks(same(model.weights(), before))
    assert outcomes == [((False, None, None), (name,))] * 8
    assert stayed == [True] * 8


def test_parameters_are_named_from_the_last_one_on() -> None:
    module = torch.nn.Sequential(*[torch.nn.Linear(1, 1, bias=False) for _ in range(5)])
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, math.nan)
    names = tuple(f"modality_submodules.images.{number}.weight" for number in (4, 3, 2))
    found = find_nonfinite_gradients({"images": [module]})
    assert [(each.parameters, each.count) for each in found] == [(names, 5)] * 8


def test_the_ranks_of_several_modules_and_a_norm_that_overflows() -> None:
    with tiny_model(COLOCATED) as model:
        for name, key, parameter in model.named():
            parameter.main_grad.zero_()
            if name == "images" and key == "sharded" and dist.get_rank() in (2, 6):
                parameter.main_grad[0, 0] = math.nan
        parts = {name: [module] for name, module in iter_modules(model)}
        found = find_nonfinite_gradients(parts)
        optimizer = get_mimo_optimizer(model, OptimizerConfig(optimizer="adam", lr=0.1))
        model.set_gradients({n: {k: 1e30 * v for k, v in values(n, 1).items()} for n in NAMES})
        outcome = optimizer.step()
    assert [each.rank for each in found] == [2, 6]
    sentence = gradients_sentence(("images",), found)
    assert sentence == (
        "gradients of images are not finite (ranks 2, 6: modality_submodules.images.sharded)"
    )
    assert outcome == (False, None, None)
    assert (optimizer.nonfinite_modules, optimizer.nonfinite_gradients) == (NAMES, ())
    sentence = gradients_sentence(optimizer.nonfinite_modules, ())
    assert sentence == (
        "gradients of images and language are not finite (images: no single element, their norm "
        "overflows; language: no single element, their norm overflows)"
    )


def failed_step(one: Run, step: int, spoil: Callable[[Run], list]) -> list[tuple]:
    """A step with something spoilt on rank 3; nothing but the random numbers may have moved."""
    handles = spoil(one) if dist.get_rank() == 3 else []
    before, schedule = one.weights(), one.trainer.scheduler.num_steps
    result = one.trainer.step(one.batches, step)
    for handle in handles:
        handle.remove()
    moved = not same(one.weights(), before) or one.trainer.scheduler.num_steps != schedule
    return on_all_ranks((result.success, result.modules, result.problem, moved))


def spoilt_gradient(part: str) -> Callable[[Run], list]:
    def spoil(one: Run) -> list:
        named = [(n, p) for n, p in one.built.model.named_parameters() if n.startswith(part)]
        return [named[-1][1].register_hook(lambda gradient: gradient * math.nan)]

    return spoil


def spoilt_output(name: str) -> Callable[[Run], list]:
    def spoil(one: Run) -> list:
        module = dict(iter_modules(one.built.model))[name]
        return [module.register_forward_hook(lambda _m, _i, output: output * math.inf)]

    return spoil


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_goes_on_as_if_the_skipped_steps_had_not_been(dtype: str) -> None:
    with run(FAN_IN, dtype=getattr(torch, dtype)) as one:
        one.train(0, 1)
        found = {part: failed_step(one, 1, spoilt_gradient(part)) for part in PREFIX.values()}
        outputs = {name: failed_step(one, 1, spoilt_output(name)) for name in NAMES}
        losses = one.train(1, 3)
        rates = [group["lr"] for group in one.trainer.optimizer.param_groups]
        assert one.trainer.scheduler.num_steps == 3
    with run(FAN_IN, dtype=getattr(torch, dtype)) as undisturbed:
        assert undisturbed.train(0, 3)[1:] == losses
        assert [g["lr"] for g in undisturbed.trainer.optimizer.param_groups] == rates
    for name in NAMES:
        answers = found[PREFIX[name]]
        assert len(set(answers)) == 1
        success, modules, problem, moved = answers[0]
        assert (success, moved, modules) == (False, False, (name,))
        assert problem.startswith(f"gradients of {name} are not finite (rank"), problem
        assert f": {PREFIX[name]}" in problem
        assert "3" in problem[: problem.index(":")]
        success, modules, problem, moved = outputs[name][0]
        assert len(set(outputs[name])) == 1
        assert (success, moved) == (False, False)
        assert name in modules
        assert "the output of " + name + " is not finite (rank" in problem, problem
