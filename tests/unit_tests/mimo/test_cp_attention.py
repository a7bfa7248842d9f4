# SPDX-License-Identifier: Apache-2.0
"""Context-parallel attention in one process.

Each CP rank's module is run in turn on its chunks of a global problem; the all-gather is replaced
by the global keys and values in rank order, so autograd adds up what all ranks' queries ask of
them. The oracle is the unsharded formula in float64. The bound of 1e-12 is a thousand times the
rounding of sums this long, and a billionth of the effect of one misplaced token.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron.core.models.mimo.partition.attention_segments import natural_pieces
from megatron.core.models.mimo.transformer import context_parallel_attention as cpa
from megatron.core.models.mimo.transformer.context_parallel_attention import (
    ContextParallelAttention,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.enums import AttnMaskType
from tests.unit_tests.mimo.attention_oracle import (
    Case,
    FakeGroup,
    Storages,
    fake_groups,
    reference,
    reference_with_gradients,
    tiny_config,
)

EXACT = {"rtol": 0.0, "atol": 1e-12}

CASES = [
    pytest.param(Case((16,), (16,), batch=2), id="causal"),
    pytest.param(Case((16,), (16,), batch=2, groups=2), id="grouped"),
    pytest.param(Case((16,), (16,), batch=3, groups=1, causal=False), id="bidirectional"),
    pytest.param(Case((16,), (16,), head_dim=6, value_dim=4), id="narrow-values"),
    pytest.param(Case((8, 16, 8), (8, 16, 8), groups=2, packed=True), id="packed"),
    pytest.param(Case((5, 16, 1), (8, 16, 8), groups=2, packed=True), id="packed-padded"),
    pytest.param(
        Case((5, 0, 9), (8, 8, 16), causal=False, packed=True), id="packed-bidirectional"
    ),
]


def build(
    cp: FakeGroup | None = None, mask_type: AttnMaskType = AttnMaskType.causal, **config: object
) -> ContextParallelAttention:
    size = 1 if cp is None else cp.count
    return ContextParallelAttention(
        config=tiny_config(context_parallel_size=size, **config),
        layer_number=1,
        attn_mask_type=mask_type,
        attention_type="self",
        cp_comm_type=None,
        pg_collection=fake_groups(cp=cp),
    )


def mask_type_of(case: Case) -> AttnMaskType:
    return AttnMaskType.causal if case.causal else AttnMaskType.no_mask


def run_rank(
    attention: ContextParallelAttention, case: Case, local: list[torch.Tensor]
) -> torch.Tensor:
    """Call the module as stock self-attention does; ``(t, b, heads * d)``."""
    q, k, v = (x.squeeze(1) for x in local) if case.packed else local
    out = attention(
        q,
        k,
        v,
        None,
        attn_mask_type=mask_type_of(case),
        attention_bias=None,
        packed_seq_params=case.packed_params(),
    )
    return out.unsqueeze(1) if case.packed else out


@pytest.mark.parametrize("cp_size", [1, 2, 4])
@pytest.mark.parametrize("case", CASES)
def test_every_rank_together_is_the_unsharded_attention(
    case: Case, cp_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v, grad = case.tensors()
    places = [case.positions(rank, cp_size) for rank in range(cp_size)]
    gathered = torch.cat([torch.cat([k, v], dim=-1)[p] for p in places])
    monkeypatch.setattr(cpa._GatherSequence, "apply", lambda x, group: gathered)
    outputs = []
    for rank, place in enumerate(places):
        attention = build(FakeGroup(rank, cp_size))
        outputs.append(run_rank(attention, case, [q[place], k[place], v[place]]))
    torch.cat(outputs).backward(torch.cat([grad[p] for p in places]).flatten(-2))

    out, q_grad, k_grad, v_grad = reference_with_gradients(case)
    for local, place in zip(outputs, places, strict=True):
        torch.testing.assert_close(local.detach(), out[place], **EXACT)
    torch.testing.assert_close(q.grad, q_grad, **EXACT)
    torch.testing.assert_close(k.grad, k_grad, **EXACT)
    torch.testing.assert_close(v.grad, v_grad, **EXACT)


def test_padding_yields_zeros_and_takes_no_gradient() -> None:
    case = Case((5, 3), (8, 8), packed=True, causal=False)
    q, k, v, grad = case.tensors()
    out = run_rank(build(), case, [q, k, v])
    out.backward(grad.flatten(-2))
    padding = torch.cat([torch.arange(5, 8), torch.arange(11, 16)])
    for tensor in (out, q.grad, k.grad, v.grad):
        assert torch.count_nonzero(tensor[padding]) == 0
        assert torch.count_nonzero(tensor) == tensor.numel() // 2  # 8 of 16 tokens are real


def test_rank_with_nothing_but_padding_keeps_the_gather_in_its_graph(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else its peers would wait for it in the backward collective, and DDP for its gradients."""
    case = Case((1,), (8,), packed=True)
    q, k, v, _ = case.tensors()
    place = case.positions(1, 2)  # positions 2 to 5, all padding
    entered: list[int] = []

    def gather(x: torch.Tensor, group: FakeGroup) -> torch.Tensor:
        gathered = torch.cat([x, x])
        if gathered.requires_grad:  # in backward keys are gathered again, without a gradient
            gathered.register_hook(lambda g: entered.append(g.size(0)))
        return gathered

    monkeypatch.setattr(cpa._GatherSequence, "apply", gather)
    out = run_rank(build(FakeGroup(1, 2)), case, [q[place], k[place], v[place]])
    assert torch.count_nonzero(out) == 0
    out.sum().backward()
    assert entered == [8]
    for tensor in (q, k, v):
        assert torch.count_nonzero(tensor.grad) == 0  # there, and zero


def test_a_rank_of_padding_gathers_again_with_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its queries need no keys, and gradients of its output may be zeros."""
    case = Case((1,), (8,), packed=True)
    q, k, v, _ = case.tensors()
    place = case.positions(1, 2)
    gathers: list[int] = []

    def gather(x: torch.Tensor, group: FakeGroup) -> torch.Tensor:
        gathers.append(x.size(0))
        return torch.cat([x, x])

    monkeypatch.setattr(cpa._GatherSequence, "apply", gather)
    out = run_rank(build(FakeGroup(1, 2)), case, [q[place], k[place], v[place]])
    assert gathers == [4]
    (0 * out).sum().backward()
    assert gathers == [4, 4]


@pytest.mark.parametrize("fold", [True, False], ids=["", "control"])
def test_grouped_queries_in_fp32_repeat_no_keys_and_write_no_scores(
    fold: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No tensor of the forward pass is larger than the queries, or than all keys and values."""
    monkeypatch.setattr(cpa._GatherSequence, "apply", lambda x, group: torch.cat([x] * 4))
    if not fold:
        repeat = lambda q, *kv: (q, *(x.repeat(1, 1, 16, 1) for x in kv))  # noqa: E731
        monkeypatch.setattr(cpa, "_by_groups", repeat)
    q, k, v = (torch.randn(16, 1, heads, 8, requires_grad=True) for heads in (16, 1, 1))
    attention = build(FakeGroup(1, 4), AttnMaskType.no_mask)
    with Storages() as storages:
        run = attention(q, k, v, None)
    run.sum().backward()
    own, whole = 16 * 16 * 8 * 4, 64 * 2 * 8 * 4
    assert (max(storages.sizes()) <= max(own, whole)) is fold


def test_packed_in_inference_mode() -> None:
    """Its tensors count no versions, so their lengths are read each time."""
    case = Case((5, 16, 1), (8, 16, 8), packed=True)
    with torch.inference_mode():
        q, k, v, _ = case.tensors()
        out = run_rank(build(), case, [q, k, v])
    torch.testing.assert_close(out.clone(), reference_with_gradients(case)[0], **EXACT)


def test_keys_and_values_are_gathered_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []

    def gather(x: torch.Tensor, group: FakeGroup) -> torch.Tensor:
        shapes.append(tuple(x.shape))
        return torch.cat([x, x])

    monkeypatch.setattr(cpa._GatherSequence, "apply", gather)
    case = Case((8,), (8,), batch=2, groups=2, head_dim=6, value_dim=4)
    q, k, v, _ = case.tensors()
    place = case.positions(0, 2)
    run_rank(build(FakeGroup(0, 2)), case, [q[place], k[place], v[place]])
    assert shapes == [(4, 2, 2, 10)]


@pytest.mark.parametrize("cp_size", [1, 2, 3, 4])
def test_natural_pieces_undo_the_gather(cp_size: int) -> None:
    lengths = (2 * cp_size, 4 * cp_size)
    case = Case(lengths, lengths, packed=True)
    gathered = torch.cat([case.positions(r, cp_size) for r in range(cp_size)])
    chunks = [n // (2 * cp_size) if cp_size > 1 else n for n in lengths]
    per_rank = [c for c in chunks for _ in range(2 if cp_size > 1 else 1)]
    pieces = gathered.split(per_rank * cp_size)
    natural = torch.cat([pieces[i] for seq in natural_pieces(2, cp_size) for i in seq])
    assert natural.tolist() == list(range(case.total))


# --- without CP ---------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
def test_explicit_mask(causal: bool) -> None:
    """It replaces the causal one; see test_attention_masks.py."""
    case = Case((8,), (8,), batch=2, groups=2, causal=causal)
    q, k, v, _ = case.tensors()
    forbidden = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(1)) < 0.4
    forbidden[..., torch.arange(8), torch.arange(8)] = False
    out = build(mask_type=mask_type_of(case))(q, k, v, forbidden)
    expected = reference(q, k, v, ~forbidden, None)
    torch.testing.assert_close(out, expected, **EXACT)


@pytest.mark.parametrize("queries", [1, 3])
def test_more_keys_than_queries_is_causal_from_the_last_key(queries: int) -> None:
    """Stock's static inference keeps earlier keys; PyTorch's is_causal aligns to the first."""
    case = Case((8,), (8,))
    q, k, v, _ = case.tensors()
    out = build()(q[-queries:], k, v, None)
    expected = reference(q, k, v, case.allowed(), None)[-queries:]
    torch.testing.assert_close(out, expected, **EXACT)


def test_a_dispatch_mode_changes_nothing() -> None:
    """PyTorch cannot make the mask of fewer queries than keys while its FLOP counter is on."""
    query, key = torch.randn(3, 1, 4, 8), torch.randn(8, 1, 4, 8)
    attention = build()
    expected = attention(query, key, key, None)
    with FlopCounterMode(display=False):
        out = attention(query, key, key, None)
    assert torch.equal(out, expected)


def test_softmax_scale_is_used() -> None:
    case = Case((8,), (8,))
    q, k, v, _ = case.tensors()
    attention = ContextParallelAttention(
        tiny_config(), 1, AttnMaskType.causal, "self", softmax_scale=0.7
    )
    torch.testing.assert_close(
        attention(q, k, v, None), reference(q, k, v, case.allowed(), 0.7), **EXACT
    )


def test_a_dropout_of_0_overrides_the_configs(seeded_tracker: None) -> None:
    case = Case((8,), (8,))
    q, k, v, _ = case.tensors()
    arguments = tiny_config(attention_dropout=0.5), 1, AttnMaskType.causal, "self"
    found = ContextParallelAttention(*arguments, attention_dropout=0.0)(q, k, v, None)
    torch.testing.assert_close(found, reference(q, k, v, case.allowed(), None), **EXACT)
    other = ContextParallelAttention(*arguments)(q, k, v, None)
    assert (other - found).abs().max() > 0.1


def test_mask_type_of_the_call_overrides_the_layers() -> None:
    case = Case((8,), (8,), causal=False)
    q, k, v, _ = case.tensors()
    out = build(mask_type=AttnMaskType.causal)(q, k, v, None, attn_mask_type=AttnMaskType.no_mask)
    torch.testing.assert_close(out, reference(q, k, v, case.allowed(), None), **EXACT)


def test_arguments_of_other_versions_are_tolerated() -> None:
    attention = ContextParallelAttention(
        tiny_config(), 1, AttnMaskType.causal, "self", k_channels=6, v_channels=6, new_option=1
    )
    q, k, v, _ = Case((8,), (8,)).tensors()
    assert attention(q, k, v, None, num_splits=1).shape == (8, 1, 24)


# --- dropout ------------------------------------------------------------------------------


@pytest.fixture
def seeded_tracker() -> Iterator[None]:
    state = torch.get_rng_state()
    model_parallel_cuda_manual_seed(7, tp_rank=0, ep_rank=0, etp_rank=0)
    yield
    torch.set_rng_state(state)


def dropout_draws_from(sequence_parallel: bool) -> tuple[torch.Tensor, bool]:
    parallel = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    attention = build(attention_dropout=0.5, **(parallel if sequence_parallel else {}))
    q, k, v, _ = Case((8,), (8,), batch=2).tensors()
    before = torch.get_rng_state()
    out = attention.train()(q, k, v, None)
    return out, not torch.equal(before, torch.get_rng_state())


def test_dropout_draws_from_the_tracker(seeded_tracker: None) -> None:
    dropped, default_moved = dropout_draws_from(sequence_parallel=False)
    q, k, v, _ = Case((8,), (8,), batch=2).tensors()
    kept = build(attention_dropout=0.5).eval()(q, k, v, None)
    assert not default_moved
    assert (dropped - kept).abs().max() > 0.1


def test_under_sequence_parallelism_the_block_has_forked_already(seeded_tracker: None) -> None:
    _, default_moved = dropout_draws_from(sequence_parallel=True)
    assert default_moved


def test_no_dropout_needs_no_tracker() -> None:
    q, k, v, _ = Case((8,), (8,)).tensors()
    before = torch.get_rng_state()
    build().train()(q, k, v, None)
    assert torch.equal(before, torch.get_rng_state())


# --- packed boundaries --------------------------------------------------------------------


def test_boundaries_are_fetched_once_per_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fetch waits for the device; every layer of every forward asks for the same ones."""
    case = Case((5, 8), (8, 8), packed=True)
    params = case.packed_params()
    fetched: list[int] = []
    original = torch.Tensor.tolist

    def tolist(self: torch.Tensor) -> list[int]:
        fetched.append(self.numel())
        return original(self)

    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    q, k, v = (x.squeeze(1) for x in case.tensors()[:3])
    for _ in range(3):
        build()(q, k, v, None, packed_seq_params=params)
    assert len(fetched) == 4  # real and padded, queries and keys
    params.cu_seqlens_q_padded.add_(0)  # in place: the old integers may be stale
    build()(q, k, v, None, packed_seq_params=params)
    assert len(fetched) == 6  # that tensor is both the queries' and the keys'


def test_dense_format_parameters_are_not_packed() -> None:
    case = Case((8,), (8,), batch=2)
    q, k, v, _ = case.tensors()
    out = build()(q, k, v, None, packed_seq_params=PackedSeqParams(qkv_format="sbhd"))
    torch.testing.assert_close(out, reference(q, k, v, case.allowed(), None), **EXACT)


# --- refusals -----------------------------------------------------------------------------


def packed(real: list[int], padded: list[int] | None = None, kv: list[int] | None = None):
    def tensor(values: list[int] | None) -> torch.Tensor | None:
        return None if values is None else torch.tensor(values, dtype=torch.int32)

    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=tensor(real),
        cu_seqlens_kv=tensor(kv or real),
        cu_seqlens_q_padded=tensor(padded),
        cu_seqlens_kv_padded=tensor(padded),
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"softmax_type": "off-by-one"}, "does not support softmax_type='off-by-one'"),
        ({"log_max_attention_logit": True}, "not support log_max_attention_logit=True"),
        ({"window_size": (4, 0)}, r"does not support window_size=\(4, 0\)"),
        ({"qk_clip": True}, "does not support qk_clip=True"),
    ],
)
def test_features_that_change_the_result_are_refused(
    options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_group_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"context_parallel_size is 2, but .* has 4 ranks"):
        ContextParallelAttention(
            tiny_config(context_parallel_size=2),
            1,
            AttnMaskType.causal,
            "self",
            pg_collection=fake_groups(cp=FakeGroup(0, 4)),
        )


def test_cross_attention_is_for_cp_1() -> None:
    groups = fake_groups(cp=FakeGroup(0, 2))
    config = tiny_config(context_parallel_size=2)
    with pytest.raises(ValueError, match="shards self-attention only, got 'cross' with .* 2; use"):
        ContextParallelAttention(config, 1, AttnMaskType.no_mask, "cross", pg_collection=groups)
    ContextParallelAttention(tiny_config(), 1, AttnMaskType.no_mask, "cross")


def test_bias_is_refused() -> None:
    q, k, v, _ = Case((8,), (8,)).tensors()
    with pytest.raises(ValueError, match="attention_bias is not supported"):
        build()(q, k, v, None, attention_bias=torch.zeros(1))


def test_mask_under_cp_or_packing_is_refused() -> None:
    q, k, v, _ = Case((8,), (8,)).tensors()
    mask = torch.zeros(8, 8, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"must be None with context parallelism \(CP 2\)"):
        build(FakeGroup(0, 2))(q, k, v, mask)
    with pytest.raises(ValueError, match="must be None with packed sequences"):
        build()(q, k, v, mask, packed_seq_params=packed([0, 8]))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (packed([0, 8], kv=[0, 4]), r"cu_seqlens_kv is \[0, 4\] and the queries' is \[0, 8\]"),
        (packed([0, 8], padded=[0, 4]), r"\[0, 8\] does not fit into .* \[0, 4\]"),
        (packed([0, 4], padded=[0, 4, 8]), r"\[0, 4\] does not fit into .* \[0, 4, 8\]"),
        (packed([0, 4]), "holds 8 query and 8 key tokens, but .* at CP 1 say 4"),
    ],
)
def test_boundaries_that_do_not_fit_are_refused(params: PackedSeqParams, message: str) -> None:
    q, k, v = (x.squeeze(1) for x in Case((8,), (8,)).tensors()[:3])
    with pytest.raises(ValueError, match=message):
        build()(q, k, v, None, packed_seq_params=params)


def test_sequence_that_cp_cannot_cut_is_refused() -> None:
    q, k, v = (x.squeeze(1) for x in Case((6,), (6,)).tensors()[:3])
    with pytest.raises(ValueError, match="divisible by 4"):
        build(FakeGroup(0, 2))(q[:3], k[:3], v[:3], None, packed_seq_params=packed([0, 6]))
