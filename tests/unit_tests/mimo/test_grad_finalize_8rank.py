# SPDX-License-Identifier: Apache-2.0
"""One token count divides the gradients of all modules, wherever the modules sit."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.models.mimo.gradients import finalize as grad_finalize
from megatron.core.models.mimo.gradients.finalize import (
    MimoGradFinalizer,
    iter_modules,
    wrap_modules_with_ddp,
)
from megatron.core.models.mimo.training.groups import create_process_groups, make_grid
from tests.harness.backend import own_device
from tests.unit_tests.mimo.tiny_modules import (
    COLOCATED,
    DISJOINT,
    TinyModel,
    config,
    on_all_ranks,
    own,
    tiny_model,
    values,
)

pytestmark = pytest.mark.ranks(8)

# tp fastest, then cp, dp, pp, as make_grid orders ranks.
LANGUAGE_LAYOUTS = [
    {"tp": 2, "cp": 2, "dp": 2},
    {"tp": 1, "cp": 2, "dp": 4},
    {"tp": 8},
    {"tp": 2, "cp": 2, "pp": 2},
    {"cp": 2, "pp": 4},
    {"tp": 1, "cp": 1, "dp": 2, "pp": 4},
]


def coordinates(rank: int, sizes: dict[str, int]) -> dict[str, int]:
    found = {}
    for axis in ("tp", "cp", "dp", "pp"):
        rank, found[axis] = divmod(rank, sizes.get(axis, 1))
    return found


def tokens_of(rank: int, sizes: dict[str, int]) -> int:
    """Valid tokens that a rank has counted: uneven, TP copies equal, 0 before the last stage."""
    place = coordinates(rank, sizes)
    if place["pp"] != sizes.get("pp", 1) - 1:
        return 0
    return 3 + 7 * place["cp"] + 100 * place["dp"]


def token_count(tokens: int) -> torch.Tensor:
    return torch.tensor(tokens, dtype=torch.int, device=own_device())


def n_global(sizes: dict[str, int]) -> int:
    """Every (dp, cp) once."""
    pairs = [(d, c) for d in range(sizes.get("dp", 1)) for c in range(sizes.get("cp", 1))]
    return sum(3 + 7 * c + 100 * d for d, c in pairs)


@pytest.mark.parametrize(
    "sizes", LANGUAGE_LAYOUTS, ids=lambda s: "".join(f"{k}{v}" for k, v in s.items())
)
def test_tokens_are_counted_once_over_dp_and_cp(sizes: dict[str, int]) -> None:
    grid = make_grid(**sizes)
    try:
        finalizer = MimoGradFinalizer({"language": create_process_groups(grid)})
        count = token_count(tokens_of(dist.get_rank(), sizes))
        result = finalizer.reduce_token_count(count)
        assert result is count
        counts = on_all_ranks(int(count))
        # Stages without a loss count integers, whatever the last one does.
        last = tokens_of(dist.get_rank(), sizes) > 0
        weights = torch.tensor(0.25 * tokens_of(dist.get_rank(), sizes), device=own_device())
        weights = weights if last else torch.tensor(0, dtype=torch.int, device=own_device())
        fractions = on_all_ranks(float(finalizer._token_sum(weights)))
    finally:
        dist.barrier()
        grid.destroy()
    assert counts == [n_global(sizes)] * 8
    assert fractions == [0.25 * n_global(sizes)] * 8


@pytest.mark.parametrize(
    "images, language",
    [
        ({"tp": 2, "dp": 2}, {"tp": 2, "cp": 2, "rank_offset": 4}),
        ({"dp": 2}, {"tp": 2, "cp": 1, "dp": 3, "rank_offset": 2}),
        ({"tp": 2, "dp": 2, "rank_offset": 4}, {"tp": 1, "cp": 2, "dp": 2}),
        ({"dp": 4}, {"cp": 2, "pp": 2, "rank_offset": 4}),
    ],
    ids=["halves", "tp2dp3", "encoder_last", "stages"],
)
def test_the_count_reaches_ranks_outside_the_language_grid(images: dict, language: dict) -> None:
    grids = {"images": make_grid(**images), "language": make_grid(**language)}
    sizes = {axis: size for axis, size in language.items() if axis != "rank_offset"}
    first = language.get("rank_offset", 0)
    try:
        collections = {name: create_process_groups(grid) for name, grid in grids.items()}
        finalizer = MimoGradFinalizer(collections, grids)
        inside = grids["language"].is_current_rank_in_grid()
        # A rank outside may hold anything: it has no tokens of its own.
        tokens = tokens_of(dist.get_rank() - first, sizes) if inside else 999
        count = token_count(tokens)
        counts = on_all_ranks(int(finalizer.reduce_token_count(count)))
    finally:
        dist.barrier()
        for grid in grids.values():
            grid.destroy()
    assert counts == [n_global(sizes)] * 8


def test_a_rank_outside_the_language_grid_needs_the_grids() -> None:
    with tiny_model(DISJOINT) as model:
        if model.language_model is None:
            with pytest.raises(ValueError, match="outside the grid of 'language'.*give .*grids"):
                MimoGradFinalizer(model.collections)
        else:
            MimoGradFinalizer(model.collections)


def test_the_language_models_groups_are_required() -> None:
    with pytest.raises(ValueError, match=r"needs the groups of 'language', got \['images'\]"):
        MimoGradFinalizer({"images": None})


def local_gradients(model: TinyModel) -> None:
    """Each DP rank its own: the whole gradient times its place, so that the sum is known."""
    for name, key, parameter in model.named():
        groups = model.collections[name]
        part = own(name, key, values(name, 1)[key], groups)
        parameter.main_grad.copy_(part * (1 + groups.dp_cp.rank()))


def sums_of(model: TinyModel, divisor: float) -> bool:
    """Whether every gradient is the sum over its module's dp x cp, divided."""
    for name, key, parameter in model.named():
        groups = model.collections[name]
        copies = groups.dp_cp.size()
        part = own(name, key, values(name, 1)[key], groups)
        expected = part * (copies * (copies + 1) // 2) / divisor
        torch.testing.assert_close(parameter.main_grad, expected, rtol=1e-6, atol=0.0)
    return True


@pytest.mark.parametrize("layouts", [COLOCATED, DISJOINT], ids=["colocated", "disjoint"])
@pytest.mark.parametrize("tokens", ["uneven", "one_rank", "none", "unknown"])
def test_all_modules_are_divided_by_the_same_count(layouts: dict, tokens: str) -> None:
    sizes = {a: s for a, s in layouts["language"].items() if a != "rank_offset"}
    first = layouts["language"].get("rank_offset", 0)
    with tiny_model(layouts) as model:
        local_gradients(model)
        finalizer = MimoGradFinalizer(model.collections, model.grids)
        mine = tokens_of(dist.get_rank() - first, sizes) if model.language_model else 0
        expected = n_global(sizes)
        if tokens == "one_rank":
            place = coordinates(dist.get_rank() - first, sizes)
            mine, expected = (5 if mine and not (place["dp"] or place["cp"]) else 0), 5
        count = token_count(0 if tokens == "none" else mine)
        finalizer([model], None if tokens == "unknown" else count)
        # Without a valid token the true gradients are zero; here they are not, and stay as they
        # are instead of becoming inf.
        assert sums_of(model, expected if tokens in ("uneven", "one_rank") else 1)


@pytest.mark.parametrize("layouts", [COLOCATED, DISJOINT], ids=["colocated", "disjoint"])
def test_a_batch_without_tokens_leaves_zeros(layouts: dict) -> None:
    with tiny_model(layouts) as model:
        for _, _, parameter in model.named():
            parameter.main_grad.zero_()
        finalizer = MimoGradFinalizer(model.collections, model.grids)
        finalizer([model], token_count(0))
        assert all(torch.count_nonzero(p.main_grad) == 0 for _, _, p in model.named())
        assert len(list(model.named())) == (4 if layouts is COLOCATED else 2)


@pytest.mark.parametrize("layouts", [COLOCATED, DISJOINT], ids=["colocated", "disjoint"])
@pytest.mark.parametrize("unit", [0.25, 2.0**-20, 0.0])
def test_sums_below_one_divide_exactly(layouts: dict, unit: float) -> None:
    """Down to zero, which leaves what is there, and not only in the first step."""
    sizes = {a: s for a, s in layouts["language"].items() if a != "rank_offset"}
    first = layouts["language"].get("rank_offset", 0)
    with tiny_model(layouts) as model:
        finalizer = MimoGradFinalizer(model.collections, model.grids)
        for dtype in (torch.float32, torch.float64):
            local_gradients(model)
            mine = tokens_of(dist.get_rank() - first, sizes) if model.language_model else 0
            count = torch.tensor(mine * unit, dtype=dtype, device=own_device())
            finalizer([model], count)
            assert sums_of(model, n_global(sizes) * unit or 1)
            assert float(count) == n_global(sizes) * unit


def test_counts_beyond_the_whole_numbers_of_fp32_are_exact() -> None:
    with tiny_model(COLOCATED) as model:
        finalizer = MimoGradFinalizer(model.collections, model.grids)
        sizes, unit = COLOCATED["language"], 2**24 + 1
        for dtype in (torch.int64, torch.float64):
            mine = tokens_of(dist.get_rank(), sizes) * unit
            count = torch.tensor(mine, dtype=dtype, device=own_device())
            assert int(finalizer.reduce_token_count(count)) == n_global(sizes) * unit


@pytest.mark.parametrize("wrong", [-1.0, float("nan"), float("inf")])
def test_sums_that_nothing_can_be_divided_by(wrong: float) -> None:
    """An error on every rank in the first step, gradients that are not finite in later ones."""
    with tiny_model(COLOCATED) as model:
        finalizer = MimoGradFinalizer(model.collections, model.grids)
        with pytest.raises(ValueError, match=r"token weights .* sum up to .*loss mask must be fin"):
            finalizer([model], torch.tensor(wrong, device=own_device()))
        local_gradients(model)
        finalizer([model], torch.tensor(wrong, device=own_device()))
        assert all(p.main_grad.isnan().all() for _, _, p in model.named())


def test_force_all_reduce_reaches_every_module(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    with tiny_model(COLOCATED) as model:
        monkeypatch.setattr(
            grad_finalize,
            "finalize_model_grads",
            lambda *_, force_all_reduce: told.append(force_all_reduce),
        )
        for forced in (True, False):
            MimoGradFinalizer(model.collections)([model], None, force_all_reduce=forced)
    assert told == [True, True, False, False]


def test_a_module_that_averages_is_refused_and_nothing_is_wrapped() -> None:
    with tiny_model(COLOCATED, wrap=False) as model:
        before = dict(iter_modules(model))
        configs = {"language": config(), "images": config(calculate_per_token_loss=False)}
        with pytest.raises(
            ValueError, match="module 'images' has calculate_per_token_loss=False.*set it to True"
        ):
            wrap_modules_with_ddp(
                model, configs, DistributedDataParallelConfig(), model.collections
            )
        assert dict(iter_modules(model)) == before


def test_every_module_gets_a_ddp_config_of_its_own() -> None:
    shared = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    with tiny_model(COLOCATED, wrap=False) as model:
        wrap_modules_with_ddp(
            model, {"language": config(), "images": config()}, shared, model.collections
        )
        wrapped = dict(iter_modules(model))
        configs = [module.ddp_config for module in wrapped.values()]
        groups = {name: module.dp_cp_group for name, module in wrapped.items()}
        expected = {name: model.collections[name].dp_cp for name in wrapped}
    assert sorted(wrapped) == ["images", "language"]
    assert configs[0] is not configs[1]
    assert all(c is not shared for c in configs)
    assert all(c.grad_reduce_in_fp32 for c in configs)
    assert groups == expected


def test_modules_are_visited_language_first_and_absent_ones_left_out() -> None:
    with tiny_model(DISJOINT) as model:
        names = [name for name, _ in iter_modules(model)]
    assert names == (["images"] if dist.get_rank() < 4 else ["language"])
    with tiny_model(COLOCATED, wrap=False) as model:
        assert [name for name, _ in iter_modules(model)] == ["language", "images"]
