# SPDX-License-Identifier: Apache-2.0
"""Language models with experts on 8 ranks, against one unsharded process.

As ``test_end_to_end_8rank.py``: the digits job's model, colocated with its encoder, the whole
global batch in one process as the oracle. Experts are spread over EP and expert TP here; each rank
compares those it has, and together they must have all.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron.core.models.mimo import compat
from megatron.core.models.mimo.training.global_names import global_modules
from megatron.core.transformer.moe.router import Router
from mimo_colocated.launch.layouts import Layout
from tests.models import model
from tests.models.model import BuiltModel, Experts, ModelOptions, build_model
from tests.models.trainer import Trainer, TrainOptions
from tests.parity.compare import GRADIENTS, tensor_checks, tolerances, worst_by_kind
from tests.parity.rows import Reference
from tests.parity.tasks import batches
from tests.parity.tensors import (
    complete_gradients,
    local_gradients,
    local_weights,
    whole_tensors,
)
from tests.unit_tests.mimo.digits_runs import run, same
from tests.unit_tests.mimo.test_end_to_end_8rank import BATCH, LOSS_TOLERANCE, SIZE

pytestmark = pytest.mark.ranks(8)

PLAIN = Experts(count=4, per_token=2)
# Sums over tokens and over samples, so no cut of the batch changes them. The weights are large:
# without these losses the router's gradient is another one altogether.
ROUTER_LOSSES = replace(PLAIN, balance="seq_aux_loss", balance_coeff=0.1, z_coeff=0.01)
# A mean over a microbatch of one replica: the oracle takes a microbatch for each replica.
PER_REPLICA = replace(PLAIN, balance="aux_loss", balance_coeff=0.1)
_EXPERT = ".local_experts."


@dataclass(frozen=True)
class Case:
    """One parallel run to compare with the oracle."""

    language: str
    experts: Experts = PLAIN
    micro_batches: int = 1
    sequence_parallel: bool = False
    overlap: bool = False
    distributed_optimizer: bool = False
    dtype: torch.dtype = torch.float32
    # Of the language model's TransformerConfig, beside what the job sets.
    config: tuple[tuple[str, object], ...] = ()

    def __str__(self) -> str:
        switches = ("sequence_parallel", "overlap", "distributed_optimizer")
        parts = [self.language.replace("=", "").replace(",", "")]
        parts += [self.experts.dispatcher, self.experts.balance]
        parts += [name for name in switches if getattr(self, name)]
        return "-".join(parts + [name for name, _ in self.config])


CASES = [
    Case("tp=1,cp=2,dp=4,ep=1"),
    Case("tp=1,cp=2,dp=4,ep=2", distributed_optimizer=True),
    Case("tp=1,cp=2,dp=4,ep=4", micro_batches=2, overlap=True),
    Case("tp=1,cp=1,dp=8,ep=4", replace(ROUTER_LOSSES, dispatcher="allgather")),
    Case("tp=1,cp=2,dp=4,ep=2", PER_REPLICA),
    Case("tp=2,cp=2,dp=2,ep=2", ROUTER_LOSSES, sequence_parallel=True, distributed_optimizer=True),
    Case("tp=2,cp=2,dp=2,ep=4,etp=1", micro_batches=2, sequence_parallel=True, overlap=True),
    Case("tp=2,cp=2,dp=2,ep=1,etp=1", ROUTER_LOSSES, sequence_parallel=True),
    Case("tp=1,cp=2,dp=4,ep=2,etp=2", distributed_optimizer=True, overlap=True),
    Case("tp=1,cp=2,pp=2,dp=2,ep=4", ROUTER_LOSSES, micro_batches=2, distributed_optimizer=True),
    # Biases of experts are whole on every rank that has the expert; TP ranks have different ones.
    Case("tp=2,cp=2,dp=2,ep=4,etp=1", sequence_parallel=True, config=(("add_bias_linear", True),)),
    Case(
        "tp=2,cp=2,dp=2,ep=2",
        sequence_parallel=True,
        config=(("moe_shared_expert_intermediate_size", 32),),
    ),
]


@functools.cache
def data():
    """The batches, the same on all ranks."""
    return batches(Reference("images", BATCH, "uneven"))


def options(case: Case) -> ModelOptions:
    """Model options of a case."""
    return ModelOptions(
        size=SIZE,
        dtype=case.dtype,
        distributed_optimizer=case.distributed_optimizer,
        overlap_grad_reduce=case.overlap,
        sequence_parallel=case.sequence_parallel,
        experts=case.experts,
    )


def trainer(built: BuiltModel, case: Case) -> Trainer:
    """With a learning rate from the first step on."""
    settings = TrainOptions(
        steps=10, global_batch_size=BATCH, micro_batches=case.micro_batches, warmup_steps=0
    )
    return Trainer(built, settings, case.distributed_optimizer)


def built_model(case: Case) -> BuiltModel:
    """The model in the case's layout, beside an encoder on DP 8."""
    return build(case, Layout(dp=8), Layout.parse(case.language, "language"))


def build(case: Case, *layouts: Layout, rank_offset: int = 0) -> BuiltModel:
    """The model, with what the case changes in the language model's config."""
    job_configs = model.transformer_configs

    def changed(*args: object) -> dict:
        configs = job_configs(*args)
        configs["language"] = dataclasses.replace(configs["language"], **dict(case.config))
        return configs

    with mock.patch.object(model, "transformer_configs", changed):
        return build_model(*layouts, options(case), rank_offset=rank_offset)


def gradients(built: BuiltModel) -> dict[str, torch.Tensor]:
    """Global name -> finalised gradient, whole, of the parameters of this rank."""
    complete_gradients(built.model)
    return whole_tensors(built.model, built.collections, local_gradients(built.model))


def forbid(built: BuiltModel, expert: int, samples: range) -> None:
    """No token of these samples of the global batch goes to ``expert``."""

    def without(gating, hidden: torch.Tensor) -> torch.Tensor:
        logits = gating(hidden)  # (S, B, experts)
        own = logits.size(1)
        first = built.collections["language"].dp.rank() * own
        offset = torch.zeros(1, own, logits.size(2), device=logits.device)
        offset[:, [b for b in range(own) if first + b in samples], expert] = -1e4
        return logits + offset.to(logits)

    for _, module in global_modules(built.model):
        if isinstance(module, Router):
            module.gating = functools.partial(without, module.gating)


def let_biases_be_added(built: BuiltModel) -> None:
    """Stock adds an expert's bias in place, which autograd forbids at EP 1: give it a copy."""
    for name, layer in global_modules(built.model):
        if _EXPERT in name and name.endswith("linear_fc2"):
            layer.register_forward_hook(lambda _layer, _inputs, out: (out[0].clone(), out[1]))


class Oracle:
    """(loss, tokens, gradients) of the unsharded model, computed once per kind."""

    def __init__(self) -> None:
        self._known: dict = {}

    def __call__(self, case: Case, forbidden: range = range(0)) -> tuple:
        replicas = Layout.parse(case.language, "language").dp
        micro_batches = replicas if case.experts.balance == "aux_loss" else 1
        alike = replace(
            case,
            language="tp=1,dp=1",
            experts=replace(case.experts, dispatcher="alltoall"),
            micro_batches=micro_batches,
            sequence_parallel=False,
            overlap=False,
            distributed_optimizer=False,
        )
        key = (alike, forbidden)
        if key not in self._known:
            single = Layout()
            built = build(alike, single, single, rank_offset=dist.get_rank())
            forbid(built, 3, forbidden)
            let_biases_be_added(built)
            loss, tokens = trainer(built, alike).gradients(data(), 0)
            self._known[key] = (loss, tokens, gradients(built))
            dist.barrier()
            built.destroy()
        return self._known[key]


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle()


def check_gradients(built: BuiltModel, expected: dict[str, torch.Tensor]) -> None:
    """Every gradient of this rank is the oracle's, and all ranks together have all."""
    found = gradients(built)
    names: list = [None] * dist.get_world_size()
    dist.all_gather_object(names, sorted(found))
    assert set().union(*names) == set(expected)
    (worst,) = worst_by_kind(list(tensor_checks("gradients", found, expected, GRADIENTS)))
    assert worst.passed, f"{worst.where}: {worst.error:.2e}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_gradients_and_norm_equal_the_unsharded_model(case: Case, oracle: Oracle) -> None:
    loss, tokens, whole = oracle(case)
    built = built_model(case)
    try:
        steps = trainer(built, case)
        run_loss, run_tokens = steps.gradients(data(), 0)
        assert run_tokens == tokens
        assert run_loss == pytest.approx(loss, rel=LOSS_TOLERANCE)
        check_gradients(built, whole)
        success, norm, _ = steps.optimizer.step()
    finally:
        dist.barrier()
        built.destroy()
    norms: list = [None] * dist.get_world_size()
    dist.all_gather_object(norms, norm)
    assert success
    assert len(set(norms)) == 1
    expected = torch.stack([g.double().norm() for g in whole.values()]).norm().item()
    assert norm == pytest.approx(expected, rel=GRADIENTS)


def test_bf16_is_as_near_to_fp32_as_on_one_rank(oracle: Oracle) -> None:
    """All tokens go to all experts: of two that are nearly tied, rounding would choose.

    Both bf16 runs round about as often on the way from fp32's gradients; a contribution that is
    lost or doubled is an error of order 1.
    """
    everywhere = replace(PLAIN, per_token=PLAIN.count)
    language = "tp=1,cp=2,dp=4,ep=4"
    overlaps = {"overlap": True, "distributed_optimizer": True}
    case = Case(language, everywhere, **overlaps, dtype=torch.bfloat16)
    _, _, exact = oracle(replace(case, dtype=torch.float32))
    _, tokens, alone = oracle(case)
    built = built_model(case)
    try:
        _, found_tokens = trainer(built, case).gradients(data(), 0)
        found = gradients(built)
    finally:
        dist.barrier()
        built.destroy()
    assert found_tokens == tokens
    assert any(_EXPERT in name for name in found)
    for name, gradient in found.items():
        size = exact[name].norm()
        rounded = float((alone[name].float() - exact[name]).norm() / size)
        error = float((gradient.float() - exact[name]).norm() / size)
        assert 0 < error <= max(2 * rounded, tolerances("bfloat16", 1e-4).gradients), name


UNUSED = Case("tp=1,cp=2,dp=4,ep=4", overlap=True, distributed_optimizer=True)


def test_an_expert_that_some_ranks_do_not_use(oracle: Oracle) -> None:
    """Samples 0-3 are those of DP rank 0: one of the two copies of expert 3 gets no token."""
    forbidden = range(4, BATCH)
    loss, _, whole = oracle(UNUSED, forbidden)
    expert = [g for name, g in whole.items() if f"{_EXPERT}3." in name]
    assert expert
    assert all(torch.count_nonzero(g) for g in expert)
    built = built_model(UNUSED)
    try:
        forbid(built, 3, forbidden)
        run_loss, _ = trainer(built, UNUSED).gradients(data(), 0)
        assert run_loss == pytest.approx(loss, rel=LOSS_TOLERANCE)
        check_gradients(built, whole)
    finally:
        dist.barrier()
        built.destroy()


def test_an_expert_that_nobody_uses_only_decays(oracle: Oracle) -> None:
    """Its gradient is zero on all copies, and weight decay alone moves it, alike on all."""
    _, _, whole = oracle(UNUSED, range(BATCH))
    built = built_model(UNUSED)
    try:
        forbid(built, 3, range(BATCH))
        steps = trainer(built, UNUSED)
        before = local_weights(built.model)
        steps.gradients(data(), 0)
        check_gradients(built, whole)
        learning_rate = steps.optimizer.param_groups[0]["lr"]
        success, _, _ = steps.optimizer.step()
        after = local_weights(built.model)
    finally:
        dist.barrier()
        built.destroy()
    assert success
    assert learning_rate > 0
    expert = [name for name in before if f"{_EXPERT}3." in name]
    held: list = [None] * dist.get_world_size()
    dist.all_gather_object(held, expert)
    assert sum(map(bool, held)) == 2
    kept = 1.0 - learning_rate * steps.options.weight_decay
    for name in expert:
        assert not torch.count_nonzero(whole[name])
        # Two roundings of fp32: of the factor and of the product.
        torch.testing.assert_close(after[name], before[name] * kept, rtol=2.0**-22, atol=0.0)
        assert not torch.equal(after[name], before[name])


def router_biases(built: BuiltModel) -> dict[str, torch.Tensor]:
    """Global name of the router -> the bias that keeps its experts' loads equal."""
    routers = ((n, m) for n, m in global_modules(built.model) if isinstance(m, Router))
    return {name: router.expert_bias.clone() for name, router in routers}


def test_a_routers_bias_follows_the_loads_of_all_ranks() -> None:
    """Up or down by one step per expert; the next microbatches are routed by it."""
    settings = (("moe_router_enable_expert_bias", True), ("moe_router_score_function", "sigmoid"))
    cases = [
        Case("tp=2,cp=2,dp=2,ep=2", sequence_parallel=True, config=settings),
        Case("tp=1,cp=2,pp=2,dp=2,ep=4", micro_batches=2, overlap=True, config=settings),
    ]
    if not compat.EXPERT_BIAS_TAKES_GROUPS:
        with pytest.raises(ValueError, match="moe_router_enable_expert_bias=True, whose update"):
            built_model(cases[0])
        return
    whole = Case("tp=1,dp=1", config=settings)
    single = build(whole, Layout(), Layout(), rank_offset=dist.get_rank())
    try:
        steps = trainer(single, whole)
        expected = [(steps.gradients(data(), step), router_biases(single)) for step in (0, 1)]
    finally:
        dist.barrier()
        single.destroy()
    assert all(torch.count_nonzero(bias) > 1 for bias in expected[0][1].values())
    for case in cases:
        built = built_model(case)
        try:
            steps = trainer(built, case)
            for step, ((loss, tokens), biases) in enumerate(expected):
                found = steps.gradients(data(), step)
                assert found == (pytest.approx(loss, rel=LOSS_TOLERANCE), tokens)
                mine = router_biases(built)
                assert mine
                for name, bias in mine.items():
                    torch.testing.assert_close(bias, biases[name], rtol=0.0, atol=0.0)
            saved = [key for key in built.model.sharded_state_dict() if "expert_bias" in key]
            assert len(saved) == len(mine)
        finally:
            dist.barrier()
            built.destroy()


def test_a_checkpoint_goes_on_at_another_ep(shared_tmp_path: Path) -> None:
    """EP 2 -> EP 4 without expert TP -> EP 2 -> EP 1: weights and Adam's state, bit for bit."""
    here, there = shared_tmp_path / "here", shared_tmp_path / "there"
    ep2 = ("tp=1,dp=8", "tp=1,cp=2,dp=4,ep=2")
    ep4 = ("tp=2,dp=4", "tp=2,cp=2,dp=2,ep=4,etp=1")
    ep1 = ("tp=1,dp=8", "tp=1,cp=1,dp=8")
    more = {"experts": PLAIN, "sequence_parallel": True}
    with run(ep2, **more) as first:
        first.train(0, 1)
        first.save(first.store(here), 1)
        weights, state = first.weights(), first.optimizer_state()
        losses = first.train(1, 2)
        with run(ep4, seed=6, **more) as second:
            second.load(second.store(here), 1)
            second.save(second.store(there), 1)
            # fp32 sums in another order.
            assert second.train(1, 2) == pytest.approx(losses, rel=LOSS_TOLERANCE)
        first.load(first.store(there), 1)
        assert same(first.weights(), weights)
        assert all(torch.equal(a, b) for a, b in zip(first.optimizer_state(), state, strict=True))
    with run(ep1, seed=7, **more) as third:
        third.load(third.store(there), 1)
        assert third.train(1, 2) == pytest.approx(losses, rel=LOSS_TOLERANCE)
