# SPDX-License-Identifier: Apache-2.0
"""Experts in one process: the grid's expert view, sizes that are refused, the router of 0.16."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from megatron.core.models.mimo import compat
from megatron.core.models.mimo.training.experts import check_expert_sizes
from megatron.core.models.mimo.training.groups import EXPERT_VIEW, make_grid
from megatron.core.models.mimo.transformer.layer_specs import language_layer_spec
from megatron.core.models.mimo.transformer.router import PerTokenRouter
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

MISSES_RANKS = compat.ROUTER_LOSSES_MISS_RANKS


@dataclass(frozen=True)
class Group:
    """As much of a process group as is asked for."""

    ranks: int
    place: int = 0

    def size(self) -> int:
        return self.ranks

    def rank(self) -> int:
        return self.place


def groups(tp: int = 1, ep: int = 1, expt_tp: int | None = None) -> SimpleNamespace:
    return SimpleNamespace(
        tp=Group(tp), ep=Group(ep), expt_tp=Group(tp if expt_tp is None else expt_tp)
    )


def config(**overrides: object) -> TransformerConfig:
    settings = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "num_moe_experts": 4}
    settings |= {"moe_router_load_balancing_type": "none", "calculate_per_token_loss": True}
    settings |= {"add_bias_linear": False}
    return TransformerConfig(**{**settings, **overrides})


# ---- the grid -----------------------------------------------------------------------------------


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "16")


@pytest.mark.parametrize(
    ("sizes", "view"),
    [
        ({"tp": 2, "cp": 2, "dp": 2, "ep": 4}, [2, 4, 1, 1]),
        ({"tp": 2, "cp": 2, "dp": 2, "ep": 4, "expt_tp": 1}, [1, 4, 2, 1]),
        ({"tp": 2, "dp": 4, "pp": 2, "ep": 2}, [2, 2, 2, 2]),
        ({"tp": 4, "dp": 2, "expt_tp": 2}, [2, 1, 4, 1]),
        ({"dp": 8, "expt_tp": 2}, [2, 1, 4, 1]),
        ({"tp": 2, "dp": 2, "ep": 1}, [2, 1, 2, 1]),
    ],
    ids=str,
)
def test_expert_dp_is_what_is_left(world: None, sizes: dict, view: list[int]) -> None:
    grid = make_grid(**sizes)
    assert grid._views[EXPERT_VIEW].shape == view
    assert grid._views[EXPERT_VIEW].dim_names == ["expt_tp", "ep", "expt_dp", "pp"]
    assert grid._views[EXPERT_VIEW].shared_dims == ["pp"]


def test_without_ep_there_is_no_view(world: None) -> None:
    assert EXPERT_VIEW not in make_grid(tp=2, dp=4)._views


def test_experts_stay_on_their_pipeline_stage(world: None) -> None:
    grid = make_grid(tp=2, cp=2, dp=2, pp=2, ep=2, expt_tp=1)
    assert grid.get_rank_enum("ep", view=EXPERT_VIEW)[:2] == [[0, 1], [2, 3]]
    assert grid.get_rank_enum("expt_dp", view=EXPERT_VIEW) == [
        [0, 2, 4, 6], [1, 3, 5, 7], [8, 10, 12, 14], [9, 11, 13, 15]
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"tp": 2, "cp": 2, "dp": 2, "ep": 3},
            r"ep=3 with expt_tp=2 does not fit: .* the 8 ranks of a pipeline stage .*"
            r"with expt_tp=2, ep can be \[1, 2, 4\]",
        ),
        ({"dp": 4, "pp": 2, "ep": 8}, r"the 4 ranks .* ep can be \[1, 2, 4\]"),
        ({"tp": 2, "dp": 4, "expt_tp": 3}, r"ep=1 with expt_tp=3 .*choose another expt_tp"),
        ({"tp": 2, "dp": 4, "ep": 0}, r"ep=0 with expt_tp=2 does not fit"),
        ({"tp": 2, "dp": 4, "expt_tp": 0}, r"choose another expt_tp"),
    ],
    ids=str,
)
def test_sizes_that_do_not_divide_are_refused(world: None, sizes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_grid(**sizes)


# ---- what wrapping refuses ----------------------------------------------------------------------


def test_a_module_without_experts_may_have_any_groups() -> None:
    check_expert_sizes("language", config(num_moe_experts=None), groups(tp=2, ep=3))


def test_sizes_that_agree_are_taken() -> None:
    agreeing = config(
        tensor_model_parallel_size=2,
        sequence_parallel=True,
        expert_model_parallel_size=2,
        expert_tensor_parallel_size=1,
    )
    check_expert_sizes("language", agreeing, groups(tp=2, ep=2, expt_tp=1))


@pytest.mark.parametrize(
    ("settings", "sizes", "message"),
    [
        (
            {},
            {"ep": 2},
            "module 'language' has expert_model_parallel_size=1 in its config and ep=2 in its "
            "grid.* give make_grid ep=1",
        ),
        (
            {"expert_tensor_parallel_size": 1},
            {"expt_tp": 2},
            "expert_tensor_parallel_size=1 in its config and expt_tp=2 in its grid",
        ),
        (
            {"expert_model_parallel_size": 3},
            {"ep": 3},
            r"num_moe_experts=4, which ep=3 does not divide; ep can be \[1, 2, 4\]",
        ),
        (
            {"tensor_model_parallel_size": 2},
            {"tp": 2},
            "experts and tp=2 without sequence parallelism.* set sequence_parallel=True or tp=1",
        ),
        (
            {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1},
            {"tp": 2, "expt_tp": 1},
            "experts and tp=2 without sequence parallelism",
        ),
    ],
)
def test_sizes_that_disagree_are_refused(settings: dict, sizes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_expert_sizes("language", config(**settings), groups(**sizes))


def test_a_router_bias_is_refused_where_it_needs_global_groups(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    biased = config(moe_router_enable_expert_bias=True, moe_router_score_function="sigmoid")
    monkeypatch.setattr(compat, "EXPERT_BIAS_TAKES_GROUPS", True)
    check_expert_sizes("language", biased, groups())
    monkeypatch.setattr(compat, "EXPERT_BIAS_TAKES_GROUPS", False)
    with pytest.raises(ValueError, match="moe_router_enable_expert_bias.*megatron-core 0.19 or an"):
        check_expert_sizes("language", biased, groups())


# ---- the router ---------------------------------------------------------------------------------


def router_of(layer: ModuleSpec) -> type | None:
    """The router's class in a layer spec; 0.16 has specs there, 0.19 partial functions."""
    mlp = layer.submodules.mlp
    submodules = getattr(mlp, "keywords", vars(mlp)).get("submodules")
    return getattr(submodules, "router", None)


def test_the_router_is_exchanged_where_its_losses_miss_ranks() -> None:
    (layer,) = language_layer_spec(config()).submodules.layer_specs
    (dense,) = language_layer_spec(config(num_moe_experts=None)).submodules.layer_specs
    assert router_of(layer) is (PerTokenRouter if MISSES_RANKS else TopKRouter)
    assert router_of(dense) is None


@pytest.mark.parametrize("name", [None, "fp32", "fp64"])
def test_the_router_computes_in_its_dtype(name: str | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(moe_utils, "te_general_gemm", raising=False)
    one = Group(1)
    collection = SimpleNamespace(tp=one, cp=one, tp_cp=one, tp_dp_cp=one)
    router = PerTokenRouter(config(moe_router_dtype=name), collection)
    torch.manual_seed(3)
    hidden = torch.randn(5, 8).bfloat16()
    router.weight.data = torch.randn(4, 8).bfloat16()
    dtype = {None: torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}[name]
    found = router.gating(hidden)
    assert found.dtype is dtype
    # A product of numbers that were rounded before, so float32 and float64 round it no further.
    exact = hidden.double() @ router.weight.detach().double().t()
    near = (found.double() - exact).abs().max() < 1e-5
    assert near == (name is not None)


def test_a_padding_mask_is_refused() -> None:
    one = Group(1)
    collection = SimpleNamespace(tp=one, cp=one, tp_cp=one, tp_dp_cp=one)
    router = PerTokenRouter(config(), collection)
    with pytest.raises(ValueError, match=r"takes no padding_mask, got one of shape \(6,\)"):
        router.apply_z_loss(torch.zeros(6, 4), padding_mask=torch.ones(6, dtype=torch.bool))


def test_the_z_loss_of_other_ranks_is_that_of_training() -> None:
    """As stock's: an evaluation with gradients has none."""
    settings, one, two = config(), Group(1), Group(2)
    settings.moe_z_loss_coeff = 0.2
    collection = SimpleNamespace(tp=one, cp=two, tp_cp=two, tp_dp_cp=two)
    router = PerTokenRouter(settings, collection)
    router.set_layer_number(1)
    logits = torch.randn(6, 4, requires_grad=True)
    assert router.train().apply_z_loss(logits) is not logits
    assert router.eval().apply_z_loss(logits) is logits


@pytest.mark.parametrize("kind", ["aux_loss", "seq_aux_loss"])
def test_the_weight_of_the_routers_losses_is_their_coefficient_times_tokens(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the formulas: the router's own product, balancing and z loss of 6 tokens of 2 samples."""
    settings = config(moe_router_load_balancing_type=kind, moe_aux_loss_coeff=0.3)
    settings.moe_z_loss_coeff = 0.2
    # A sum over a group of one.
    monkeypatch.setattr(
        moe_utils, "reduce_from_tensor_model_parallel_region", lambda counts, group: counts
    )
    one = Group(1)
    collection = SimpleNamespace(tp=one, cp=one, tp_cp=one, tp_dp_cp=one)
    router = (PerTokenRouter if MISSES_RANKS else TopKRouter)(settings, collection)
    router.set_layer_number(1)
    torch.manual_seed(3)
    hidden = torch.randn(3, 2, 8)
    probs, routing = router(hidden)
    (found,) = torch.autograd.grad(probs.sum() * 0.0, router.weight)

    weight = router.weight.detach().requires_grad_()
    logits = hidden @ weight.t()  # (S, B, experts)
    scores, chosen = logits.softmax(-1), routing.view(3, 2, 4).double()
    loads, shares = (chosen.sum((0, 1)), scores.mean((0, 1)))
    balance = 4 * (loads / loads.sum() * shares).sum() * 6
    if kind == "seq_aux_loss":
        loads, shares = chosen.sum(0), scores.mean(0)
        balance = 4 * (loads / loads.sum(-1, keepdim=True) * shares).sum() * 3
    z = logits.logsumexp(-1).square().sum()
    (expected,) = torch.autograd.grad(0.3 * balance + 0.2 * z, weight)
    # One product and some sums of six terms in fp32.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
