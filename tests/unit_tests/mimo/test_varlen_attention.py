# SPDX-License-Identifier: Apache-2.0
"""Packed attention in one call per layer, on a stand-in for PyTorch's kernel, which needs a GPU.

The oracle is the unsharded attention in float64, and the path of a call per segment; bounds are
those of ``test_cp_attention_properties``. PyTorch's own operator runs over ``meta`` tensors: shapes
and arguments, no numbers. What only a GPU can show is in ``tests/gpus``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import given

from megatron.core.models.mimo.partition.attention_segments import attention_segments
from megatron.core.models.mimo.transformer import context_parallel_attention as cpa
from megatron.core.models.mimo.transformer import varlen_attention
from megatron.core.models.mimo.transformer.context_parallel_attention import (
    ContextParallelAttention,
)
from megatron.core.models.mimo.transformer.gathered_keys import GatheredKeys
from megatron.core.models.mimo.transformer.varlen_attention import attend_segments, varlen_kernel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from tests.harness.host_waits import PlayedDevice
from tests.unit_tests.mimo.attention_oracle import (
    Case,
    reference_with_gradients,
    tiny_config,
)
from tests.unit_tests.mimo.in_process_ranks import InProcessGroup, InProcessWorld
from tests.unit_tests.mimo.test_cp_attention_properties import (
    BOUND,
    RotaryCase,
    check_rotary_attention,
    rotary_cases,
)
from tests.unit_tests.mimo.varlen_stand_in import VarlenStandIn


@pytest.fixture
def kernel() -> Iterator[VarlenStandIn]:
    with VarlenStandIn().in_place() as put:
        yield put


def attention_of(
    group: InProcessGroup, causal: bool = True, **options: object
) -> ContextParallelAttention:
    mask_type = AttnMaskType.causal if causal else AttnMaskType.no_mask
    groups = ProcessGroupCollection(cp=group)
    config = tiny_config(context_parallel_size=group.size())
    return ContextParallelAttention(config, 1, mask_type, "self", pg_collection=groups, **options)


def on_ranks(case: Case, cp: int) -> list[list[torch.Tensor]]:
    """Output and gradients of q, k, v of each CP rank."""

    def body(rank: int) -> list[torch.Tensor]:
        attention = attention_of(InProcessGroup(0, tuple(range(cp)), rank), case.causal)
        place = case.positions(rank, cp)
        *local, grad = (x.detach()[place].squeeze(1) for x in case.tensors())
        leaves = [x.requires_grad_() for x in local]
        out = attention(*leaves, None, packed_seq_params=case.packed_params())
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.flatten(-2))]

    return InProcessWorld(cp).run(body)


# --- the same numbers ---------------------------------------------------------------------


@given(case=rotary_cases(packed=True))
def test_one_call_is_the_unsharded_attention(case: RotaryCase) -> None:
    with VarlenStandIn().in_place():
        check_rotary_attention(case)


CASES = [
    pytest.param(Case((8, 16, 8), (8, 16, 8), packed=True), id="packed"),
    # The second sequence leaves all but CP rank 0 with nothing but padding; the third all.
    pytest.param(Case((9, 1, 0, 16), (16, 8, 8, 16), groups=2, packed=True), id="padded"),
    pytest.param(
        Case((9, 1, 0, 0, 16), (16, 8, 8, 0, 16), groups=1, packed=True, causal=False),
        id="bidirectional",
    ),
]


@pytest.mark.parametrize("cp", [1, 2, 4])
@pytest.mark.parametrize("case", CASES)
def test_one_call_is_a_call_per_segment(case: Case, cp: int, kernel: VarlenStandIn) -> None:
    once = on_ranks(case, cp)
    assert len(kernel.segments) == cp
    with mock.patch.object(cpa, "varlen_kernel", return_value=None):
        each = on_ranks(case, cp)
    assert len(kernel.segments) == cp
    for mine, other in zip(once, each, strict=True):
        for one, wanted in zip(mine, other, strict=True):
            torch.testing.assert_close(one, wanted, **BOUND)


def test_control_a_kernel_that_aligns_to_the_first_key() -> None:
    case = RotaryCase(replace(CASES[0].values[0]), 2, 0)
    with VarlenStandIn(to_last_key=False).in_place(), pytest.raises(AssertionError, match="close"):
        check_rotary_attention(case)


def test_the_scale_is_the_layers(kernel: VarlenStandIn) -> None:
    case = Case((5, 8), (8, 8), packed=True)
    q, k, v = (x.squeeze(1) for x in case.tensors()[:3])
    attention = attention_of(InProcessGroup(0, (0,), 0), softmax_scale=0.7)
    out = attention(q, k, v, None, packed_seq_params=case.packed_params())
    wanted = reference_with_gradients(case, 0.7)[0].squeeze(1)
    torch.testing.assert_close(out.detach(), wanted, **BOUND)
    assert kernel.segments == [2]


def test_in_inference_mode_and_then_in_training(kernel: VarlenStandIn) -> None:
    """What inference mode makes cannot be kept for backward."""
    case = Case((5, 8), (8, 8), packed=True)
    with torch.inference_mode():
        q, k, v = (x.squeeze(1) for x in case.tensors()[:3])
        attention = attention_of(InProcessGroup(0, (0,), 0))
        out = attention(q, k, v, None, packed_seq_params=case.packed_params())
    ((trained, *_),) = on_ranks(case, 1)
    assert torch.equal(out.clone(), trained)
    assert kernel.segments == [2, 2]


# --- how many calls -----------------------------------------------------------------------


@pytest.mark.parametrize("cp", [1, 2])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("sequences", [1, 3, 50])
def test_a_layer_is_one_call(
    sequences: int, causal: bool, cp: int, kernel: VarlenStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone: list[int] = []
    attend = ContextParallelAttention._attend
    count = lambda *args: (alone.append(1), attend(*args))[1]  # noqa: E731
    monkeypatch.setattr(ContextParallelAttention, "_attend", count)
    real = tuple(1 + 3 * i % 8 for i in range(sequences - 1)) + (8,)
    on_ranks(Case(real, (8,) * sequences, causal=causal, packed=True), cp)
    # One segment is PyTorch's ordinary attention: without CP, and without a mask.
    single = sequences == 1 and (cp == 1 or not causal)
    assert (len(kernel.segments), len(alone)) == ((0, cp) if single else (cp, 0))


def test_control_a_call_per_segment_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    alone: list[int] = []
    attend = ContextParallelAttention._attend
    count = lambda *args: (alone.append(1), attend(*args))[1]  # noqa: E731
    monkeypatch.setattr(ContextParallelAttention, "_attend", count)
    on_ranks(Case((8,) * 50, (8,) * 50, packed=True), 2)
    assert len(alone) == 2 * 2 * 50


def test_a_rank_of_padding_makes_no_call_and_stays_in_the_graph(kernel: VarlenStandIn) -> None:
    """CP rank 1 has positions 2 to 5 of both sequences; the world would hang without it."""
    case = Case((1, 2), (8, 8), packed=True)
    first, second = on_ranks(case, 2)
    assert kernel.segments == [2]
    assert not any(x.any() for x in (second[0], second[1]))
    assert all(x.any() for x in (first[0], first[3]))


def test_dropout_and_dense_batches_are_not_the_kernels(kernel: VarlenStandIn) -> None:
    """It draws no dropout. Dense sequences are PyTorch's ordinary attention."""
    group = InProcessGroup(0, (0,), 0)
    case = Case((5, 8), (8, 8), packed=True)
    tensors = [x.squeeze(1) for x in case.tensors()[:3]]
    dropping = attention_of(group, attention_dropout=0.5)
    with mock.patch.object(cpa, "get_cuda_rng_tracker"):
        dropping.train()(*tensors, None, packed_seq_params=case.packed_params())
    assert kernel.segments == []
    dropping.eval()(*tensors, None, packed_seq_params=case.packed_params())
    assert kernel.segments == [2]

    def dense(rank: int) -> None:
        place = case.positions(rank, 2)
        attention_of(InProcessGroup(0, (0, 1), rank))(*(x[place] for x in case.tensors()[:3]), None)

    InProcessWorld(2).run(dense)
    assert kernel.segments == [2]


# --- where it serves ----------------------------------------------------------------------


def tensors(dtype: torch.dtype = torch.bfloat16, width: int = 16, values: int = 16, batch: int = 1):
    made = torch.randn(6, batch, 4, width), torch.randn(9, batch, 2, width)
    return [x.to(dtype) for x in (*made, torch.randn(9, batch, 2, values))]


@pytest.mark.parametrize(
    ("drawn", "on_gpu", "pytorch_can", "serves"),
    [
        (tensors(), True, True, True),
        (tensors(torch.float16), True, True, True),
        (tensors(torch.float32), True, True, False),
        (tensors(width=12, values=12), True, True, False),
        (tensors(values=8), True, True, False),
        (tensors(batch=2), True, True, False),
        (tensors(), False, True, False),
        (tensors(), True, False, False),
    ],
    ids=["bf16", "fp16", "fp32", "width", "values", "batch", "cpu", "off"],
)
def test_where_it_serves(drawn: list, on_gpu: bool, pytorch_can: bool, serves: bool) -> None:
    asked = mock.Mock(return_value=pytorch_can)
    device = PlayedDevice()
    if on_gpu:
        device.hold(drawn)
    with mock.patch.object(varlen_attention, "can_use_flash_attention", asked), device.watch():
        found = varlen_kernel(*drawn)
    assert (found is not None) is serves
    assert device.host_waits == []


def test_pytorch_is_asked_and_says_no_without_a_gpu() -> None:
    device = PlayedDevice()
    device.hold(drawn := tensors())
    with device.watch():
        assert varlen_kernel(*drawn) is None or torch.cuda.is_available()


@pytest.mark.parametrize("missing", ["module", "option", "rocm"])
def test_another_pytorch_has_none(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 2.10 there is none, the first one takes no grouped queries; ROCm's is another."""
    from torch.nn.attention import varlen

    if missing == "module":
        monkeypatch.delattr(varlen, "varlen_attn")
    elif missing == "option":
        monkeypatch.setattr(varlen, "varlen_attn", lambda query, key, value, is_causal: query)
    else:
        monkeypatch.setattr(torch.version, "hip", "6.4")
    assert varlen_attention._from_torch.__wrapped__() is None


@pytest.mark.parametrize("causal", [True, False])
def test_pytorchs_operator_takes_the_call(causal: bool) -> None:
    """Over tensors without numbers; the calls that autograd makes of it, too."""
    kernel = varlen_attention._from_torch()
    assert kernel is not None
    segments = attention_segments((16, 8), (13, 5), 0, 2, causal)
    options = {"device": "meta", "dtype": torch.bfloat16, "requires_grad": True}
    query = torch.empty(sum(segments.queries), 1, 4, 16, **options)
    both = torch.empty(sum(segments.keys), 1, 2, 32, **options)
    out = attend_segments(kernel, query, *both.split(16, dim=-1), segments, causal, 0.3)
    assert (out.shape, out.dtype) == (query.shape, query.dtype)
    out.sum().backward()
    assert (query.grad.shape, both.grad.shape) == (query.shape, both.shape)


# --- host and memory ----------------------------------------------------------------------


def waits(case: Case) -> list[str]:
    device = PlayedDevice()
    local = [x.squeeze(1).detach().requires_grad_() for x in case.tensors()[:3]]
    device.hold(local)
    attention = attention_of(InProcessGroup(0, (0,), 0))
    with VarlenStandIn(reads=device.noted).in_place() as kernel, device.watch():
        attention(*local, None, packed_seq_params=case.packed_params()).sum().backward()
    assert kernel.segments == [2]
    return [wait.what for wait in device.host_waits]


@pytest.mark.parametrize("real", [(8, 8), (5, 8)], ids=["", "padded"])
def test_the_host_waits_for_nothing(real: tuple[int, int]) -> None:
    assert waits(Case(real, (8, 8), packed=True)) == []


def test_control_lengths_out_of_pageable_memory_are_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(varlen_attention, "upload", lambda tensor, device: tensor.to(device))
    assert waits(Case((8, 8), (8, 8), packed=True)) == ["to(device) of pageable memory"]


def saved_rows(control: bool) -> list[int]:
    """Rows of every tensor of keys that CP rank 0 of 4 saves for backward."""
    case = Case((32, 32), (32, 32), packed=True, groups=2)
    found: list[int] = []
    pack = GatheredKeys._pack

    def noting(self: GatheredKeys, tensor: torch.Tensor) -> object:
        packed = tensor if control else pack(self, tensor)
        if isinstance(packed, torch.Tensor) and packed.dim() == 3 and packed.size(1) == 2:
            found.append(packed.size(0))
        return packed

    with mock.patch.object(GatheredKeys, "_pack", noting):
        on_ranks(case, 4)
    return found


@pytest.mark.parametrize("control", [False, True], ids=["", "control"])
def test_the_segments_keys_are_not_kept(control: bool, kernel: VarlenStandIn) -> None:
    """They are made again in backward; gradients are compared above."""
    whole = [4 * (2 * 4 + 1) * 2] * 2 * 4  # keys and values of two sequences, four ranks
    assert saved_rows(control) == (whole if control else [])
