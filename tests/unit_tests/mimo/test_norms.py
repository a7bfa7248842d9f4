# SPDX-License-Identifier: Apache-2.0
"""Norm layers and layer specs, in one process: what is built, and with which marks.

Models that are built from the specs run in ``test_cp_attention_ranks.py``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron.core.models.mimo.transformer import layer_specs
from megatron.core.models.mimo.transformer.context_parallel_attention import (
    ContextParallelAttention,
)
from megatron.core.models.mimo.transformer.layer_specs import (
    encoder_layer_spec,
    language_layer_spec,
)
from megatron.core.models.mimo.transformer.norms import SequenceParallelNorm
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.torch_norm import L2Norm
from tests.unit_tests.mimo.attention_oracle import tiny_config

SEQUENCE_PARALLEL = {"tensor_model_parallel_size": 2, "sequence_parallel": True}


@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
def test_norm_is_pytorchs(normalization: str) -> None:
    config = tiny_config(normalization=normalization, params_dtype=torch.float64)
    norm = SequenceParallelNorm(config, 24, eps=1e-3)
    x = torch.randn(5, 2, 24, dtype=torch.float64)
    centred = x - x.mean(-1, keepdim=True) if normalization == "LayerNorm" else x
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    torch.testing.assert_close(norm(x), expected, rtol=0.0, atol=1e-12)
    assert set(dict(norm.named_parameters())) == (
        {"weight", "bias"} if normalization == "LayerNorm" else {"weight"}
    )


@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("options", [{}, SEQUENCE_PARALLEL], ids=["plain", "sequence-parallel"])
def test_parameters_say_whether_their_gradients_are_partial(
    normalization: str, options: dict[str, object]
) -> None:
    norm = SequenceParallelNorm(tiny_config(normalization=normalization, **options), 24)
    marks = [p.sequence_parallel for p in norm.parameters()]
    assert marks == [bool(options)] * len(marks)


def test_dtype_is_the_configs() -> None:
    norm = SequenceParallelNorm(tiny_config(params_dtype=torch.bfloat16, bf16=True), 24)
    assert {p.dtype for p in norm.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalization": "L3Norm"}, r"normalization='L3Norm' is not one of \['LayerNorm', 'RMS"),
        ({"layernorm_zero_centered_gamma": True}, "zero_centered_gamma=True is not supported"),
    ],
)
def test_what_pytorchs_norms_cannot_do_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SequenceParallelNorm(tiny_config(**options), 24)


# --- layer specs --------------------------------------------------------------------------


def test_language_layers_are_causal_and_carry_this_projects_parts() -> None:
    config = tiny_config(num_layers=3, qk_layernorm=True)
    block = language_layer_spec(config).submodules
    assert len(block.layer_specs) == 3
    assert block.layer_norm is SequenceParallelNorm
    layer = block.layer_specs[0].submodules
    attention = layer.self_attention
    assert attention.params["attn_mask_type"] is AttnMaskType.causal
    assert attention.submodules.core_attention is ContextParallelAttention
    assert attention.submodules.q_layernorm is SequenceParallelNorm
    assert attention.submodules.k_layernorm is SequenceParallelNorm
    assert layer.input_layernorm is SequenceParallelNorm
    assert layer.pre_mlp_layernorm is SequenceParallelNorm


def test_norms_that_are_not_there_stay_away() -> None:
    attention = language_layer_spec(tiny_config()).submodules.layer_specs[0].submodules
    assert attention.self_attention.submodules.q_layernorm is IdentityOp
    assert attention.pre_cross_attn_layernorm is IdentityOp


def test_l2_norms_of_the_config_are_there_and_stay_without_weights() -> None:
    """Stock's function for layer specs does not look for them in the config."""
    for spec in (language_layer_spec, encoder_layer_spec):
        layer = spec(tiny_config(qk_l2_norm=True)).submodules.layer_specs[0].submodules
        attention = layer.self_attention.submodules
        assert attention.q_layernorm is attention.k_layernorm is L2Norm
        assert layer.input_layernorm is SequenceParallelNorm


def test_encoder_layers_are_bidirectional_and_stocks_spec_is_left_alone() -> None:
    encoder = encoder_layer_spec(tiny_config()).submodules.layer_specs[0].submodules
    language = language_layer_spec(tiny_config()).submodules.layer_specs[0].submodules
    assert encoder.self_attention.params["attn_mask_type"] is AttnMaskType.no_mask
    assert language.self_attention.params["attn_mask_type"] is AttnMaskType.causal


def test_a_pipeline_stage_gets_its_own_layers() -> None:
    config = tiny_config(
        num_layers=5,
        pipeline_model_parallel_size=2,
        pipeline_dtype=torch.float32,
        num_layers_in_first_pipeline_stage=3,
    )
    counts = [
        len(language_layer_spec(config, pp_rank=rank).submodules.layer_specs) for rank in (0, 1)
    ]
    assert counts == [3, 2]


def test_a_virtual_stage_gets_its_own_layers() -> None:
    config = tiny_config(
        num_layers=8,
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=2,
        pipeline_dtype=torch.float32,
    )
    for stage in (0, 1):
        spec = language_layer_spec(config, pp_rank=1, vp_stage=stage)
        assert len(spec.submodules.layer_specs) == 2


def test_one_query_group_per_tp_rank_is_enough() -> None:
    config = tiny_config(num_query_groups=2, tensor_model_parallel_size=2)
    assert language_layer_spec(config).submodules.layer_specs


def test_stage_has_to_be_named_and_an_encoder_has_one() -> None:
    config = tiny_config(num_layers=2, pipeline_model_parallel_size=2, pipeline_dtype=torch.float32)
    with pytest.raises(ValueError, match=r"size is 2: pass pp_rank \(0 to 1\)"):
        language_layer_spec(config)
    with pytest.raises(ValueError, match="An encoder has one pipeline stage, .*size=2"):
        encoder_layer_spec(config)


@pytest.mark.parametrize("layer_spec", [language_layer_spec, encoder_layer_spec])
def test_fewer_query_groups_than_tp_ranks_are_refused(layer_spec: Any) -> None:
    config = tiny_config(num_query_groups=2, tensor_model_parallel_size=4)
    with pytest.raises(ValueError, match=r"num_query_groups \(2\) .* \(4\); use TP 2 or fewer"):
        layer_spec(config)


def test_transformer_engine_attends_in_16_bits_only() -> None:
    for size, changes, attends in (
        (1, {}, False), (2, {}, False), (1, {"bf16": True}, True), (2, {"fp16": True}, True),
        (2, {"params_dtype": torch.bfloat16}, True), (1, {"params_dtype": torch.float64}, False),
    ):  # fmt: skip
        assert layer_specs.te_attends(tiny_config(context_parallel_size=size, **changes)) is attends


def test_transformer_engine_needs_a_cuda_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_specs.gpt_layer_specs, "HAVE_TE", True)
    monkeypatch.delenv("MIMO_LAYERS")  # tests say "local": see tests/conftest.py
    for cuda in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        assert layer_specs.use_transformer_engine() is cuda
    # Installed, but built for another PyTorch: stock could not import it.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(layer_specs.gpt_layer_specs, "HAVE_TE", False)
    assert layer_specs.use_transformer_engine() is False


def test_layers_are_the_local_ones_where_the_environment_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(layer_specs.gpt_layer_specs, "HAVE_TE", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert layer_specs.use_transformer_engine() is False
    monkeypatch.setenv("MIMO_LAYERS", "te")
    assert layer_specs.use_transformer_engine() is True
    monkeypatch.setenv("MIMO_LAYERS", "TE")
    with pytest.raises(ValueError, match="MIMO_LAYERS='TE' is neither 'local' nor 'te'"):
        layer_specs.use_transformer_engine()
