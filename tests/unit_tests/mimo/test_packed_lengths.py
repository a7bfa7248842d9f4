# SPDX-License-Identifier: Apache-2.0
"""Lengths of packed sequences: where they are read, how often, and what layers and kernels get."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from megatron.core.models.gpt import GPTModel
from megatron.core.models.mimo.model.language_runner import LanguageRunner
from megatron.core.models.mimo.partition.packed_lengths import (
    CU_SEQLENS,
    check_packing,
    end_to_end,
    for_kernels,
    forget_lengths,
    packed_lengths,
    padded_bounds,
    read_lengths,
    unread_lengths,
)
from megatron.core.models.mimo.transformer import host_lengths
from megatron.core.models.mimo.transformer.context_parallel_attention import (
    ContextParallelAttention,
)
from megatron.core.models.mimo.transformer.layer_specs import language_layer_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from tests.harness.backend import own_device
from tests.harness.host_waits import PlayedDevice
from tests.unit_tests.mimo.model_stubs import StubGroup, StubLanguageModel, language_config

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the device is played")

REAL, PADDED = [0, 5, 8], [0, 8, 12]


@pytest.fixture
def device() -> PlayedDevice:
    return PlayedDevice()


def fields(device: PlayedDevice, dtype: torch.dtype = torch.int64) -> dict[str, torch.Tensor]:
    """All four on the device, each in a tensor of its own."""
    ends = (REAL, REAL, PADDED, PADDED)
    made = [device.upload(torch.tensor(each, dtype=dtype)) for each in ends]
    return dict(zip(CU_SEQLENS, made, strict=True))


def test_all_fields_are_read_in_one_wait(device):
    given = fields(device)
    with device.watch():
        assert len(unread_lengths(given)) == 4
        found = {name: each.tolist() for name, each in read_lengths(given).items()}
        assert list(found.values()) == [REAL, REAL, PADDED, PADDED]
    assert [each.what for each in device.host_waits] == ["Event.synchronize"]


def test_a_packing_is_read_once_for_all_layers(device):
    given = fields(device)
    params = PackedSeqParams("thd", *(given[name] for name in CU_SEQLENS))
    with device.watch():
        assert check_packing(params, 1, 12) == PADDED
        for _ in range(3):
            assert packed_lengths(params) == ([8, 4], [5, 3])
        assert len(device.host_waits) == 1
        given["cu_seqlens_q"].add_(0)  # it may hold other values now
        packed_lengths(params)
        assert len(device.host_waits) == 2


def test_copies_are_read_not_what_a_loader_fills_anew():
    bounds = torch.tensor([0, 4, 12], dtype=torch.int32)
    read = read_lengths({"cu_seqlens_q": bounds, "cu_seqlens_kv": bounds})
    bounds.zero_()
    assert read["cu_seqlens_q"].tolist() == [0, 4, 12]
    assert read["cu_seqlens_q"] is read["cu_seqlens_kv"], "one upload for both"


def test_a_batch_is_packed_again_without_a_wait_and_a_new_one_with_one(device):
    """Stages pack a microbatch again; a loader may fill the tensors of the one before."""
    model, bounds = StubLanguageModel(language_config()), device.upload(torch.tensor([0, 4, 12]))
    given, runner = dict.fromkeys(CU_SEQLENS[:2], bounds), runner_of(model, device)

    def ends() -> list[int]:
        packed = runner.pack(given)
        assert packed is not None
        return padded_bounds(packed)

    with device.watch():
        assert ends() == ends() == [0, 4, 12]
        assert len(device.host_waits) == 1
        bounds.copy_(device.upload(torch.tensor([0, 8, 12])))
        assert ends() == [0, 8, 12]
        assert len(device.host_waits) == 2
        bounds.data.copy_(device.upload(torch.tensor([0, 6, 12])))  # counts no version
        assert ends() == [0, 8, 12]
        forget_lengths(given)
        assert ends() == [0, 6, 12]
        assert len(device.host_waits) == 3


def test_nothing_is_remembered_of_tensors_of_inference_mode(device):
    """They count no versions."""
    with torch.inference_mode(), device.watch():
        bounds = device.upload(torch.tensor([0, 4, 12]))
        for values in ([0, 4, 12], [0, 8, 12]):
            bounds.copy_(device.upload(torch.tensor(values)))
            params = PackedSeqParams("thd", bounds, bounds)
            assert packed_lengths(params)[0] == [values[1], 12 - values[1]]


@pytest.mark.parametrize("kernels", [False, True])
def test_what_comes_from_the_host_is_not_waited_for(device, kernels):
    with device.watch():
        params = end_to_end([8, 4], device.device) if kernels else end_to_end([8, 4])
        assert params.cu_seqlens_q.device.type == ("cuda" if kernels else "cpu")
        assert packed_lengths(params) == ([8, 4], [8, 4])
        assert (params.max_seqlen_q, params.max_seqlen_kv) == (8, 8)
    assert not device.host_waits


@pytest.mark.parametrize(
    ("real", "between", "kept"),
    [
        ([0, 8, 12], False, False),
        ([0, 8, 11], False, True),  # padding behind the last one is between none
        ([0, 5, 8], True, True),
        (None, False, False),
    ],
)
def test_kernels_are_told_of_padding_instead_of_comparing(device, real, between, kept):
    ends = [None if each is None else torch.tensor(each) for each in (real, real, PADDED, PADDED)]
    params = PackedSeqParams("thd", *ends)
    with device.watch():
        made: Any = for_kernels(params, device.device)
        assert made.pad_between_seqs is between
        assert (made.cu_seqlens_q_padded is not None) == kept
        assert (made.cu_seqlens_kv_padded is not None) == kept
        tensors = [each for each in vars(made).values() if isinstance(each, torch.Tensor)]
        assert all(each.device == device.device for each in tensors)
        assert for_kernels(params, device.device) is made, "once per batch, not per layer"
        if real == [0, 5, 8]:
            params.cu_seqlens_q = torch.tensor([0, 8, 12])
            params.cu_seqlens_kv = params.cu_seqlens_q
            assert for_kernels(params, device.device).pad_between_seqs is False
    assert not device.host_waits


def gpt(**settings: Any) -> GPTModel:
    config = language_config(
        num_layers=2,
        add_bias_linear=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        use_cpu_initialization=True,
    )
    one = StubGroup()
    groups = ProcessGroupCollection(tp=one, cp=one, pp=one, embd=one, tp_cp=one)
    model = GPTModel(
        config,
        language_layer_spec(config),
        vocab_size=8,
        max_sequence_length=16,
        position_embedding_type="rope",
        pg_collection=groups,
    )
    for name, value in settings.items():
        setattr(config, name, value)
    return model


def runner_of(model: nn.Module, device: PlayedDevice) -> LanguageRunner:
    device.hold(model)
    modules: Any = SimpleNamespace(stages=[model])
    return LanguageRunner(modules, modules)


def packed_by(model: nn.Module, device: PlayedDevice, given: dict[str, Any]) -> PackedSeqParams:
    runner = runner_of(model, device)
    with device.watch():
        packed = runner.pack(given)
    assert packed is not None
    assert packed.max_seqlen_q == 8
    return packed


class TestWhereLayersGetThem:
    def where(self, device: PlayedDevice, packed: PackedSeqParams) -> set[str]:
        with device.watch():
            return {getattr(packed, name).device.type for name in CU_SEQLENS}

    @pytest.mark.parametrize("on_device", [False, True])
    def test_own_layers_on_the_host(self, device, on_device):
        given = fields(device) if on_device else end_to_end([8, 4]).__dict__
        if not on_device:
            bounds = given["cu_seqlens_q"]
            given = dict.fromkeys(CU_SEQLENS, bounds)
        packed = packed_by(gpt(), device, given)
        assert self.where(device, packed) == {"cpu"}
        assert {getattr(packed, name).dtype for name in CU_SEQLENS} == {torch.int32}
        assert len(device.host_waits) == on_device

    @pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
    @pytest.mark.parametrize("on_device", [False, True])
    @pytest.mark.parametrize("kind", ["fused", "other attention", "other model"])
    def test_all_others_on_the_device(self, device, kind, on_device, dtype):
        model = {
            "fused": lambda: gpt(apply_rope_fusion=True),
            "other attention": gpt,
            "other model": lambda: StubLanguageModel(language_config()),
        }[kind]()
        if kind == "other attention":
            layers: Any = model.decoder.layers
            layers[1].self_attention.core_attention = nn.Identity()
        given = fields(device, dtype)
        if not on_device:
            ends = (REAL, REAL, PADDED, PADDED)
            made = [torch.tensor(each, dtype=dtype) for each in ends]
            given = dict(zip(CU_SEQLENS, made, strict=True))
        packed = packed_by(model, device, given)
        assert self.where(device, packed) == {"cuda"}
        with device.watch():
            assert check_packing(packed, 1, 12) == PADDED
        assert len(device.host_waits) == on_device, "they are known on the host all the same"


def test_attention_says_where_it_reads_them():
    assert ContextParallelAttention.takes_host_lengths
    assert host_lengths.reads_lengths_on_host(gpt().to(own_device()))
