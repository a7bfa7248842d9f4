# SPDX-License-Identifier: Apache-2.0
"""Context-parallel attention on 8 ranks: alone, and inside stock models.

The oracle is the unsharded computation in float64, which every rank does on its own. Bounds of
1e-12 (attention) and 1e-9 (models: two layers of sums, gradients up to hundreds) leave a factor
of 100 over what was observed; a dropped chunk, a wrong position or a missing sum is of order 1.
"""

from __future__ import annotations

import time
from collections import Counter
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.core.models.mimo.transformer import context_parallel_attention as cpa
from megatron.core.models.mimo.transformer.context_parallel_attention import (
    ContextParallelAttention,
)
from megatron.core.models.mimo.transformer.gathered_keys import GatheredKeys
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from tests.harness.backend import own_device
from tests.unit_tests.mimo.attention_oracle import (
    Case,
    Storages,
    reference_with_gradients,
    tiny_config,
)
from tests.unit_tests.mimo.parallel_models import (
    VOCABULARY,
    Layout,
    Shape,
    encoder,
    finalize_gradients,
    gpt,
    own_part,
    process_groups,
)
from tests.unit_tests.mimo.varlen_stand_in import VarlenStandIn

pytestmark = pytest.mark.ranks(8)

EXACT = {"rtol": 0.0, "atol": 1e-12}
MODEL = {"rtol": 1e-9, "atol": 1e-9}


def attention_for(groups: ProcessGroupCollection, cp_size: int) -> ContextParallelAttention:
    return ContextParallelAttention(
        tiny_config(context_parallel_size=cp_size),
        1,
        AttnMaskType.causal,
        "self",
        pg_collection=groups,
    )


def local_inputs(case: Case, cp_rank: int, cp_size: int) -> list[torch.Tensor]:
    """This rank's q, k, v as leaves, packed ones without the batch dim."""
    place = case.positions(cp_rank, cp_size)
    local = [x.detach()[place] for x in case.tensors()[:3]]
    return [(x.squeeze(1) if case.packed else x).requires_grad_() for x in local]


CASES = [
    pytest.param(lambda cp: Case((8 * cp,), (8 * cp,), batch=2), id="causal"),
    pytest.param(lambda cp: Case((8 * cp,), (8 * cp,), batch=2, groups=2), id="grouped"),
    pytest.param(lambda cp: Case((4 * cp,), (4 * cp,), causal=False), id="bidirectional"),
    pytest.param(
        # The second sequence leaves all but CP rank 0 with nothing but padding.
        lambda cp: Case((2 * cp + 1, 1), (4 * cp, 2 * cp), groups=1, packed=True), id="packed"
    ),
    pytest.param(lambda cp: Case((1,), (4 * cp,), packed=True), id="packed-one-token"),
]


@pytest.mark.parametrize("cp_size", [2, 4, 8])
@pytest.mark.parametrize("make_case", CASES)
def test_attention_and_its_gradients_are_the_unsharded_ones(make_case: Any, cp_size: int) -> None:
    check_attention(make_case(cp_size), cp_size)


@pytest.mark.parametrize("cp_size", [2, 8])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_packed_attention_in_one_call_is_the_unsharded_one(causal: bool, cp_size: int) -> None:
    lengths = (2 * cp_size + 1, 1, 4 * cp_size), (4 * cp_size, 2 * cp_size, 4 * cp_size)
    with VarlenStandIn().in_place() as kernel:
        check_attention(Case(*lengths, groups=2, causal=causal, packed=True), cp_size)
    assert len(kernel.segments) == 1


def check_attention(case: Case, cp_size: int) -> None:
    with process_groups(Layout(cp=cp_size)) as groups:
        attention = attention_for(groups, cp_size)
        rank = groups.cp.rank()
        place = case.positions(rank, cp_size)
        local = local_inputs(case, rank, cp_size)
        mask_type = AttnMaskType.causal if case.causal else AttnMaskType.no_mask
        out = attention(
            *local, None, attn_mask_type=mask_type, packed_seq_params=case.packed_params()
        )
        grad = case.tensors()[3][place].flatten(-2)
        out.backward(grad.squeeze(1) if case.packed else grad)
    got = [out.detach(), *(x.grad for x in local)]
    for mine, whole in zip(got, reference_with_gradients(case), strict=True):
        expected = whole[place]
        torch.testing.assert_close(mine, expected.squeeze(1) if case.packed else expected, **EXACT)


@pytest.fixture
def collectives(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Names of the collectives that the attention calls, counted."""
    seen: Counter[str] = Counter()
    for name in ("_all_gather", "_reduce_scatter"):
        original = getattr(cpa, name)

        def call(*args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
            seen[_name] += 1
            return _original(*args, **kwargs)

        monkeypatch.setattr(cpa, name, call)
    return seen


@pytest.mark.parametrize(
    ("cp_size", "needs_gradient", "expected"),
    [
        (2, True, {"_all_gather": 2, "_reduce_scatter": 1}),
        (2, False, {"_all_gather": 2}),
        (1, True, {}),
    ],
)
def test_number_of_collectives(
    cp_size: int, needs_gradient: bool, expected: dict[str, int], collectives: Counter[str]
) -> None:
    case = Case((8, 16), (8, 16), packed=True)
    with process_groups(Layout(cp=cp_size)) as groups:
        attention = attention_for(groups, cp_size)
        q, k, v = local_inputs(case, groups.cp.rank(), cp_size)
        # Frozen keys and values: the query's own gradient needs them again, they get none.
        k.requires_grad_(needs_gradient)
        v.requires_grad_(needs_gradient)
        attention(q, k, v, None, packed_seq_params=case.packed_params()).sum().backward()
    assert collectives == expected


def kept_per_rank(cp_size: int, lengths: tuple[int, ...] = (256,)) -> int:
    """Bytes that live between forward and backward, but for the inputs."""
    case = Case(lengths, lengths, causal=False, packed=len(lengths) > 1)
    with process_groups(Layout(cp=cp_size)) as groups:
        attention = attention_for(groups, cp_size)
        local = local_inputs(case, groups.cp.rank(), cp_size)
        with Storages() as storages:
            out = attention(
                *local,
                None,
                attn_mask_type=AttnMaskType.no_mask,
                packed_seq_params=case.packed_params(),
            )
        # Gloo's threads may still hold what they gathered when the call has returned.
        kept = min(storages.alive() for _ in range(20) if not time.sleep(0.02))
        out.sum().backward()
        del out
        assert storages.alive() < kept
    return kept


def test_what_is_kept_divides_by_cp() -> None:
    """Output, keys and values, whatever the kernel has of the queries: all of own tokens."""
    assert kept_per_rank(8) * 8 == pytest.approx(kept_per_rank(2) * 2, rel=0.02)


def test_what_one_call_keeps_divides_by_cp() -> None:
    with VarlenStandIn().in_place() as kernel:
        kept = [kept_per_rank(cp, (128, 128)) * cp for cp in (8, 2)]
    assert kernel.segments == [2, 2]
    assert kept[0] == pytest.approx(kept[1], rel=0.02)


@pytest.mark.parametrize("lengths", [(256,), (128, 128)], ids=["", "one-call"])
def test_control_whole_keys_and_values_do_not(
    lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GatheredKeys, "leaving_out", lambda self: nullcontext())
    with VarlenStandIn().in_place():
        assert kept_per_rank(8, lengths) * 8 > 1.5 * kept_per_rank(2, lengths) * 2


def test_what_was_gathered_again_goes_with_the_backward_pass() -> None:
    """Twice over the same graph is twice the gradient, and nothing stays."""
    case = Case((64,), (64,), groups=2)
    with process_groups(Layout(cp=2)) as groups:
        attention = attention_for(groups, 2)
        local = local_inputs(case, groups.cp.rank(), 2)
        out = attention(*local, None)
        out.sum().backward(retain_graph=True)
        once = [x.grad.clone() for x in local]
        with Storages() as storages:
            out.sum().backward()
        for x, grad in zip(local, once, strict=True):
            torch.testing.assert_close(x.grad, 2 * grad, **EXACT)
            x.grad = None
        whole = 64 * 2 * 2 * 8 * local[1].size(-1)
        assert storages.alive() < whole / 4


# --- inside stock models ------------------------------------------------------------------

SEQUENCE, BATCH = 32, 2
LAYOUTS = [
    Layout(cp=2),
    Layout(cp=4),
    Layout(cp=8),
    Layout(tp=2),
    Layout(tp=2, cp=2),
    Layout(tp=2, cp=2, sequence_parallel=True),
    Layout(tp=2, cp=4, sequence_parallel=True),
    Layout(tp=4, cp=2, sequence_parallel=True),
]
SHAPES = {
    "plain": Shape(),
    "grouped-qknorm": Shape(query_groups=2, qk_layernorm=True),
    "layernorm-bias-tied": Shape(normalization="LayerNorm", gated=False, bias=True, tied=True),
}


def token_ids(batch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, VOCABULARY, (batch, SEQUENCE), generator=generator).to(own_device())


def logit_gradient(batch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(6)
    whole = (batch, SEQUENCE, VOCABULARY)
    return torch.randn(whole, generator=generator, dtype=torch.float64).to(own_device())


def packed_params(lengths: tuple[int, ...] | None) -> PackedSeqParams | None:
    return None if lengths is None else Case(lengths, lengths, packed=True).packed_params()


def run_gpt(
    shape: Shape, layout: Layout, groups: ProcessGroupCollection, packed: tuple[int, ...] | None
) -> tuple[torch.nn.Module, torch.Tensor]:
    """Logits of this rank (its positions, its vocabulary part) after a backward pass."""
    batch = 1 if packed else BATCH
    model = gpt(shape, layout, groups)
    place = Case(packed or (SEQUENCE,), packed or (SEQUENCE,)).positions(
        groups.cp.rank(), layout.cp
    )
    ids = token_ids(batch)[:, place]
    positions = place.expand(batch, -1).to(own_device())
    logits = model(ids, positions, None, packed_seq_params=packed_params(packed))
    width = VOCABULARY // layout.tp
    columns = slice(groups.tp.rank() * width, (groups.tp.rank() + 1) * width)
    logits.backward(logit_gradient(batch)[:, place, columns])
    return model, logits.detach()


def check_gpt(shape: Shape, layout: Layout, packed: tuple[int, ...] | None) -> None:
    with process_groups(Layout()) as alone:
        whole, whole_logits = run_gpt(shape, Layout(), alone, packed)
    with process_groups(layout) as groups:
        model, logits = run_gpt(shape, layout, groups, packed)
        finalize_gradients(model, layout, groups)
        lengths = packed or (SEQUENCE,)
        place = Case(lengths, lengths).positions(groups.cp.rank(), layout.cp)
        expected = whole_logits[:, place].chunk(layout.tp, dim=-1)[groups.tp.rank()]
        torch.testing.assert_close(logits, expected, **MODEL)
        gradients = {name: p.grad for name, p in whole.named_parameters()}
        for name, parameter in model.named_parameters():
            wanted = own_part(gradients[name], parameter, name, groups)
            assert wanted.abs().max() > 1e-3, f"the test does not exercise {name}"
            torch.testing.assert_close(
                parameter.grad, wanted, **MODEL, msg=lambda text, name=name: f"{name}: {text}"
            )


# Every layout with one shape and every shape with several layouts: all pairs cost minutes.
PAIRS = [(layout, "plain") for layout in (LAYOUTS[0], LAYOUTS[3], LAYOUTS[7])]
PAIRS += [(layout, "grouped-qknorm") for layout in (LAYOUTS[1], LAYOUTS[4], LAYOUTS[5], LAYOUTS[6])]
PAIRS += [(layout, "layernorm-bias-tied") for layout in (LAYOUTS[2], LAYOUTS[4], LAYOUTS[5])]


@pytest.mark.parametrize(
    ("layout", "shape"), [pytest.param(p[0], p[1], id=f"{p[0]}-{p[1]}") for p in PAIRS]
)
def test_gpt_is_the_unsharded_one(layout: Layout, shape: str) -> None:
    check_gpt(SHAPES[shape], layout, None)


@pytest.mark.parametrize("layout", [LAYOUTS[1], LAYOUTS[4], LAYOUTS[5]], ids=str)
def test_packed_gpt_is_the_unsharded_one(layout: Layout) -> None:
    check_gpt(SHAPES["grouped-qknorm"], layout, (8, 16, 8))


def test_packed_sequences_are_separate_samples() -> None:
    """RoPE positions restart and nothing leaks: each sequence alone gives the same logits."""
    lengths = (8, 16, 8)
    layout = Layout(tp=2, cp=2)
    with process_groups(Layout()) as alone:
        model = gpt(SHAPES["plain"], Layout(), alone)
        pieces = token_ids(1).split(lengths, dim=1)
        separate = torch.cat([model(p, None, None) for p in pieces], dim=1).detach()
    with process_groups(layout) as groups:
        _, logits = run_gpt(SHAPES["plain"], layout, groups, lengths)
        place = Case(lengths, lengths).positions(groups.cp.rank(), 2)
        expected = separate[:, place].chunk(2, dim=-1)[groups.tp.rank()]
    torch.testing.assert_close(logits, expected, **MODEL)


@pytest.mark.parametrize(
    "layout", [Layout(tp=2), Layout(tp=4), Layout(tp=4, sequence_parallel=True)], ids=str
)
def test_bidirectional_encoder_is_the_unsharded_one(layout: Layout) -> None:
    shape = SHAPES["layernorm-bias-tied"]
    generator = torch.Generator().manual_seed(7)
    whole = (2, SEQUENCE, BATCH, 32)
    hidden, grad = torch.randn(whole, generator=generator, dtype=torch.float64).to(own_device())
    with process_groups(Layout()) as alone:
        whole = encoder(shape, Layout(), alone)
        whole_out = whole(hidden, None)
        whole_out.backward(grad)
    with process_groups(layout) as groups:
        model = encoder(shape, layout, groups)
        part = slice(None)
        if layout.sequence_parallel:
            share = SEQUENCE // layout.tp
            part = slice(groups.tp.rank() * share, (groups.tp.rank() + 1) * share)
        out = model(hidden[part].clone(), None)
        out.backward(grad[part])
        finalize_gradients(model, layout, groups)
        torch.testing.assert_close(out.detach(), whole_out.detach()[part], **MODEL)
        gradients = {name: p.grad for name, p in whole.named_parameters()}
        for name, parameter in model.named_parameters():
            wanted = own_part(gradients[name], parameter, name, groups)
            torch.testing.assert_close(parameter.grad, wanted, **MODEL)


@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
def test_without_the_sum_over_tp_norm_gradients_are_partial(normalization: str) -> None:
    """The mark on the parameters is what stock's finalize acts on: remove it and it shows."""
    layout = Layout(tp=2, cp=2, sequence_parallel=True)
    with process_groups(layout) as groups:
        model, _ = run_gpt(Shape(normalization=normalization), layout, groups, None)
        norm = model.decoder.final_layernorm
        partial = norm.weight.grad.clone()
        finalize_gradients(model, layout, groups)
        summed = partial.clone()
        dist.all_reduce(summed, group=groups.tp_cp)
    torch.testing.assert_close(norm.weight.grad, summed, **MODEL)
    assert (partial - summed).abs().max() > 1e-3


def test_recomputed_attention_gives_the_same_gradients() -> None:
    """Activation recomputation runs the gather again in backward, on every rank alike."""
    layout = Layout(tp=2, cp=2)
    more = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    with process_groups(layout) as groups:
        kept, _ = run_gpt(Shape(), layout, groups, None)
        again, _ = run_gpt(Shape(more=more), layout, groups, None)
    for mine, other in zip(again.parameters(), kept.parameters(), strict=True):
        assert torch.equal(mine.grad, other.grad)
