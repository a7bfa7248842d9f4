# SPDX-License-Identifier: Apache-2.0
"""What the optimizers of modules with different layouts agree on, colocated and on disjoint ranks.

Gradients are set by hand from the whole model's, so every norm, count and factor has a direct
computation to compare with.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.models.mimo.gradients.finalize import iter_modules
from megatron.core.models.mimo.optimizer import MimoOptimizer, get_mimo_optimizer
from megatron.core.models.mimo.training.inner_optimizers import attend_construction
from megatron.core.optimizer import OptimizerConfig
from tests.unit_tests.mimo.tiny_modules import (
    COLOCATED,
    DISJOINT,
    TinyModel,
    on_all_ranks,
    tiny_model,
    values,
)

pytestmark = pytest.mark.ranks(8)

# fp32 sums of 54 squares in another order.
TOLERANCE = 1e-6
PLACES = pytest.mark.parametrize("layouts", [COLOCATED, DISJOINT], ids=["colocated", "disjoint"])
SHARDING = pytest.mark.parametrize("distributed", [False, True], ids=["whole", "sharded"])


def optimizer_config(distributed: bool = False, **overrides: object) -> OptimizerConfig:
    settings = {"optimizer": "adam", "lr": 0.1, "weight_decay": 0.0, "clip_grad": 0.0}
    return OptimizerConfig(**{**settings, "use_distributed_optimizer": distributed, **overrides})


def gradients(step: int = 1) -> dict[str, dict[str, torch.Tensor]]:
    """Of the whole model; the modules' magnitudes differ."""
    found = {"images": values("images", step), "language": values("language", step)}
    found["images"] = {key: 30 * value for key, value in found["images"].items()}
    return found


def norm_of(parts: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float(part.double().square().sum()) for part in parts.values()))


def total_norm(whole: dict[str, dict[str, torch.Tensor]]) -> float:
    return math.sqrt(sum(norm_of(parts) ** 2 for parts in whole.values()))


def ready(model: TinyModel, config: OptimizerConfig, step: int = 1) -> MimoOptimizer:
    """An optimizer whose gradients are there."""
    optimizer = get_mimo_optimizer(model, config)
    model.set_gradients(gradients(step))
    return optimizer


def same_weights(model: TinyModel, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in model.weights().items())


@PLACES
@SHARDING
def test_the_norm_is_that_of_all_modules_on_every_rank(layouts: dict, distributed: bool) -> None:
    with tiny_model(layouts, distributed=distributed) as model:
        optimizer = ready(model, optimizer_config(distributed))
        before = model.weights()
        success, norm, zeros = optimizer.step()
        norms, by_module = on_all_ranks(norm), on_all_ranks(optimizer.get_module_grad_norms())
        moved = not same_weights(model, before)
    assert success
    assert zeros is None
    assert len(set(norms)) == 1
    assert norms[0] == pytest.approx(total_norm(gradients()), rel=TOLERANCE)
    assert all(names == by_module[0] for names in by_module)
    expected = {name: norm_of(parts) for name, parts in gradients().items()}
    assert by_module[0] == pytest.approx(expected, rel=TOLERANCE)
    assert moved


@PLACES
@SHARDING
def test_clipping_scales_every_module_by_the_same_factor(
    layouts: dict, distributed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = 0.5
    with tiny_model(layouts, distributed=distributed) as model:
        optimizer = ready(model, optimizer_config(distributed, clip_grad=clip))
        seen: list[list[torch.Tensor]] = []

        def record() -> bool:
            seen.append(
                [p.grad.clone() for o in optimizer._active_optimizers for p in o.get_parameters()]
            )
            return True

        monkeypatch.setattr(optimizer, "step_with_ready_grads", record)
        # Without clipping first: the gradients as they were.
        for inner in optimizer._active_optimizers:
            for chained in getattr(inner, "chained_optimizers", [inner]):
                chained.config.clip_grad = 0.0
        optimizer.step()
        optimizer.config.clip_grad = clip
        model.set_gradients(gradients())
        optimizer.step()
        # A rank's own shard may be all padding, not every rank's.
        compared = on_all_ranks(sum(part.numel() for part in seen[0]))
    norm = total_norm(gradients())
    # Megatron-Core's factor: it guards against a norm of zero.
    factor = clip / (norm + 1e-6)
    assert len(seen) == 2
    assert sum(compared) > 0
    for before, after in zip(*seen, strict=True):
        torch.testing.assert_close(after, before * factor, rtol=1e-5, atol=0.0)


@PLACES
@SHARDING
@pytest.mark.parametrize("rank", [1, 6])
def test_an_inf_on_one_rank_stops_all(
    layouts: dict, distributed: bool, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tiny_model(layouts, distributed=distributed) as model:
        optimizer = ready(model, optimizer_config(distributed))
        before = model.weights()
        inner = optimizer._active_optimizers[-1]
        if dist.get_rank() == rank:
            monkeypatch.setattr(inner, "prepare_grads", lambda: True)
        outcomes = on_all_ranks(optimizer.step())
        unchanged = on_all_ranks(same_weights(model, before))
        monkeypatch.undo()
        model.set_gradients(gradients())
        recovered = on_all_ranks(optimizer.step()[0])
    assert outcomes == [(False, None, None)] * 8
    assert all(unchanged)
    assert all(recovered)


def test_loss_scales_of_all_modules_back_off_together() -> None:
    """fp16: an inf in the encoder's gradients must also lower the language model's scale."""
    config = optimizer_config(
        fp16=True,
        params_dtype=torch.float16,
        initial_loss_scale=64.0,
        min_loss_scale=1.0,
        hysteresis=1,
    )
    with tiny_model(DISJOINT, dtype=torch.float16) as model:
        optimizer = get_mimo_optimizer(model, config)
        scaled = gradients()
        scaled["images"]["whole"][0] = math.inf
        model.set_gradients(scaled)
        before = model.weights()
        outcomes = on_all_ranks(optimizer.step())
        scales = on_all_ranks(float(optimizer.get_loss_scale()))
        unchanged = on_all_ranks(same_weights(model, before))
        model.set_gradients(gradients())
        norms = on_all_ranks(optimizer.step()[1])
    assert outcomes == [(False, None, None)] * 8
    assert scales == [32.0] * 8
    assert all(unchanged)
    assert norms == pytest.approx([total_norm(gradients()) / 32] * 8, rel=TOLERANCE)


@PLACES
def test_a_step_that_fails_on_one_rank_has_failed_on_all(
    layouts: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tiny_model(layouts) as model:
        optimizer = ready(model, optimizer_config())
        if dist.get_rank() == 5:
            inner = optimizer._active_optimizers[0]
            monkeypatch.setattr(inner, "step_with_ready_grads", lambda: False)
        outcomes = on_all_ranks(optimizer.step())
    assert [success for success, _, _ in outcomes] == [False] * 8
    assert len({norm for _, norm, _ in outcomes}) == 1


@PLACES
@SHARDING
@pytest.mark.parametrize("module", ["images", "language"])
def test_a_nan_in_one_module_is_the_norm_of_all(
    layouts: dict, distributed: bool, module: str
) -> None:
    with tiny_model(layouts, distributed=distributed) as model:
        optimizer = get_mimo_optimizer(model, optimizer_config(distributed))
        broken = gradients()
        broken[module]["sharded"][7, 0] = math.nan
        model.set_gradients(broken)
        optimizer.prepare_grads()
        norms = on_all_ranks(optimizer.get_grad_norm())
    assert all(math.isnan(norm) for norm in norms)


@PLACES
@SHARDING
def test_zeros_are_counted_once_over_all_modules(layouts: dict, distributed: bool) -> None:
    whole = gradients()
    whole["images"]["sharded"][::2] = 0.0
    whole["images"]["whole"][:2] = 0.0
    whole["language"]["sharded"][1, 3] = 0.0
    whole["language"]["whole"][:] = 0.0
    expected = sum(int((part == 0).sum()) for parts in whole.values() for part in parts.values())
    with tiny_model(layouts, distributed=distributed) as model:
        config = optimizer_config(distributed, log_num_zeros_in_grad=True)
        optimizer = get_mimo_optimizer(model, config)
        model.set_gradients(whole)
        counts = on_all_ranks(optimizer.step()[2])
    assert counts == [expected] * 8


@SHARDING
def test_a_step_moves_weights_as_one_adam_over_the_whole_model(distributed: bool) -> None:
    steps = 3
    reference = {
        f"{name}.{key}": torch.nn.Parameter(value)
        for name in ("images", "language")
        for key, value in values(name, 0).items()
    }
    adam = torch.optim.AdamW(reference.values(), lr=0.1, weight_decay=0.0)
    with tiny_model(DISJOINT, distributed=distributed) as model:
        optimizer = get_mimo_optimizer(model, optimizer_config(distributed, adam_eps=1e-8))
        for step in range(1, steps + 1):
            optimizer.zero_grad()
            model.set_gradients(gradients(step))
            optimizer.step()
            for name, parameter in reference.items():
                module, _, key = name.partition(".")
                parameter.grad = gradients(step)[module][key]
            adam.step()
        found = model.weights()
        groups = model.collections
    for name, value in found.items():
        whole = reference[name].detach()
        if name.endswith("sharded"):
            tp = groups[name.partition(".")[0]].tp
            whole = whole.chunk(2)[dist.get_rank() % 2]
            assert tp is not None
        torch.testing.assert_close(value, whole, rtol=1e-5, atol=1e-6)


@PLACES
def test_param_groups_are_those_of_this_ranks_modules(layouts: dict) -> None:
    with tiny_model(layouts) as model:
        optimizer = get_mimo_optimizer(model, optimizer_config())
        inner = optimizer._active_optimizers
        expected = [group for opt in inner for group in opt.param_groups]
        held = sum(group["params"] != [] for group in optimizer.param_groups)
        for group in optimizer.param_groups:
            group["lr"] = 0.25
        rates = {group["lr"] for opt in inner for group in opt.param_groups}
    assert [id(group) for group in optimizer.param_groups] == [id(group) for group in expected]
    assert len(inner) == (2 if layouts is COLOCATED else 1)
    assert held >= len(inner)
    assert rates == {0.25}


@PLACES
@pytest.mark.parametrize("frozen", [("images",), ("images", "language")], ids=["one", "all"])
def test_frozen_modules_have_no_optimizer_and_nobody_waits_for_them(
    layouts: dict, frozen: tuple[str, ...]
) -> None:
    with tiny_model(layouts, frozen=frozen) as model:
        optimizer = ready(model, optimizer_config(log_num_zeros_in_grad=True))
        before = model.weights()
        success, norm, zeros = optimizer.step()
        scale = float(optimizer.get_loss_scale())
        after = model.weights()
        state = optimizer.state_dict()
    trained = {name: parts for name, parts in gradients().items() if name not in frozen}
    assert success
    assert norm == pytest.approx(total_norm(trained), rel=TOLERANCE)
    assert zeros == 0
    assert scale == 1.0
    assert all(state[name] is None for name in frozen)
    assert optimizer.is_stub_optimizer is not any(state.values())
    for name, value in after.items():
        assert torch.equal(value, before[name]) is (name.partition(".")[0] in frozen)


def test_a_model_without_grids_is_refused() -> None:
    model = SimpleNamespace(mimo_config=SimpleNamespace(module_to_grid_map=None))
    with pytest.raises(ValueError, match="needs module_to_grid_map.*one HyperCommGrid per modal"):
        get_mimo_optimizer(model, optimizer_config())


def test_several_distributed_optimizer_instances_are_refused() -> None:
    with tiny_model(COLOCATED, wrap=False) as model:
        for _, module in iter_modules(model):
            module.ddp_config = DistributedDataParallelConfig(
                use_distributed_optimizer=True, num_distributed_optimizer_instances=2
            )
        with pytest.raises(
            ValueError, match="module 'images' asks for 2 .*set num_distributed_optimizer_instan"
        ):
            get_mimo_optimizer(model, optimizer_config())


def test_a_state_without_one_of_the_modules_is_refused() -> None:
    with tiny_model(COLOCATED) as model:
        optimizer = get_mimo_optimizer(model, optimizer_config())
        state = optimizer.state_dict()
        state.pop("images")
        with pytest.raises(ValueError, match=r"no module 'images'; it holds \['language'\]"):
            optimizer.load_state_dict(state)


def test_zero_grad_clears_all_modules() -> None:
    with tiny_model(COLOCATED) as model:
        optimizer = ready(model, optimizer_config())
        optimizer.step()
        assert any(p.grad is not None for _, _, p in model.named())
        optimizer.zero_grad()
        assert all(p.grad is None for _, _, p in model.named())


@pytest.mark.parametrize("frozen", [(), ("language",)], ids=["trained", "frozen"])
def test_parameter_groups_of_a_module_depend_on_no_other_module(
    frozen: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All ranks take part in each module's construction; those without it have no keys to add."""
    gather, calls = dist.all_gather_object, []

    def counting(found: list, value: object, *args: object, **kwargs: object) -> None:
        calls.append(value)
        gather(found, value, *args, **kwargs)

    groups = []
    for layouts in (COLOCATED, DISJOINT):
        with tiny_model(layouts, frozen=frozen) as model:
            calls.clear()
            monkeypatch.setattr(dist, "all_gather_object", counting)
            optimizer = get_mimo_optimizer(model, optimizer_config(weight_decay=0.1))
            monkeypatch.undo()
            groups.append(
                {
                    name: [sorted(g) for g in info.optimizer.param_groups]
                    for name, info in optimizer.module_infos.items()
                    if info.optimizer is not None
                }
            )
            # One compares dtypes; one asks which ranks train the module; two are Megatron-Core's.
            assert len(calls) == 1 + 2 + 2 * (2 - len(frozen))
    colocated, disjoint = groups
    assert disjoint == {name: colocated[name] for name in disjoint}
    assert sorted(colocated) == [n for n in ("images", "language") if n not in frozen]


def test_other_optimizers_need_every_module_everywhere() -> None:
    config = optimizer_config()
    config.optimizer = "muon"
    with tiny_model(DISJOINT, frozen=("images",)) as model:
        # Ranks of the language model would wait in stock code: only the others are asked here.
        if model.language_model is None:
            with pytest.raises(ValueError, match="optimizer 'muon' needs every module .*'adam'"):
                attend_construction(config)
