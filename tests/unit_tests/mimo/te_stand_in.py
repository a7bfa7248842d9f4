# SPDX-License-Identifier: Apache-2.0
"""Stands in for Transformer Engine where it is not installed; run by ``test_te_path``.

``install()`` comes before Megatron-Core is imported, which then builds its own TE classes on these.
The attention takes what TE's public ``DotProductAttention`` takes, by name, checks it as TE's
kernels would, and computes with this project's own. It shows that the calls are right; TE's
kernels themselves do not run.

As a script, under torchrun with two ranks: a GPT of TE layers on packed sequences over CP2 against
the same one on each sequence alone. Prints ``TE CALLS`` and the number of checked calls. The device
is played and watched, so that nothing on the way to TE waits for it, nor TE itself, which would
where it is not told whether there is padding between sequences.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import sys
import types
from typing import Any

import torch
from torch import Tensor, nn

VERSION = "1.12.0"
checked: list[str] = []
# A PlayedDevice; what stands in for TE's kernels may read what is on it.
device: Any = None


class Linear(nn.Module):
    """Of one TP rank."""

    def __init__(self, in_features: int, out_features: int, **options: Any) -> None:
        super().__init__()
        assert options["tp_size"] == 1
        self.parallel_mode, self.tp_size = options["parallel_mode"], 1
        self.return_bias = options["return_bias"]
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        assert not options["bias"]

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Any:
        out = nn.functional.linear(x, self.weight)
        return (out, None) if self.return_bias else out


class LayerNormLinear(Linear):
    """A norm, then the product."""

    def __init__(self, in_features: int, out_features: int, **options: Any) -> None:
        super().__init__(in_features, out_features, **options)
        assert options["normalization"] == "RMSNorm"
        self.layer_norm_weight = nn.Parameter(torch.ones(in_features))
        self.eps = options["eps"]

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Any:
        width = (x.size(-1),)
        return super().forward(nn.functional.rms_norm(x, width, self.layer_norm_weight, self.eps))


class RMSNorm(nn.Module):
    """PyTorch's."""

    def __init__(
        self,
        normalized_shape: int | None = None,
        eps: float = 1e-5,
        *,
        hidden_size: int | None = None,  # its name before TE 1.13 called it like PyTorch
        **_: Any,
    ) -> None:
        super().__init__()
        width = hidden_size if normalized_shape is None else normalized_shape
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, (x.size(-1),), self.weight, self.eps)


class DotProductAttention(nn.Module):
    """TE's arguments, checked; this project's attention."""

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int,
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        attn_mask_type: str = "causal",
        sequence_parallel: bool = False,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        tp_group: Any = None,
        layer_number: int | None = None,
        attention_type: str = "self",
        cp_group: Any = None,
        cp_global_ranks: list[int] | None = None,
        cp_stream: Any = None,
        cp_comm_type: str = "p2p",
        softmax_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.cp_group, self.cp_comm_type = cp_group, cp_comm_type
        if cp_group is not None:
            assert cp_global_ranks == torch.distributed.get_process_group_ranks(cp_group)
            # TE has packed sequences over CP with this one only.
            assert cp_comm_type == "p2p"

    def forward(
        self,
        query_layer: Tensor,
        key_layer: Tensor,
        value_layer: Tensor,
        attention_mask: Tensor | None = None,
        qkv_format: str | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_kv: Tensor | None = None,
        cu_seqlens_q_padded: Tensor | None = None,
        cu_seqlens_kv_padded: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        attn_mask_type: str | None = None,
        pad_between_seqs: bool | None = None,
    ) -> Tensor:
        with device.noted() if device else contextlib.nullcontext():
            ends = cu_seqlens_q, cu_seqlens_kv, cu_seqlens_q_padded, cu_seqlens_kv_padded
            how = qkv_format, attn_mask_type, pad_between_seqs, max_seqlen_q, max_seqlen_kv
            return self._attend(query_layer, key_layer, value_layer, *how, *ends)

    def _attend(
        self,
        query_layer: Tensor,
        key_layer: Tensor,
        value_layer: Tensor,
        qkv_format: str | None,
        attn_mask_type: str | None,
        pad_between_seqs: bool | None,
        max_seqlen_q: Any,
        max_seqlen_kv: Any,
        *ends: Any,
    ) -> Tensor:
        from megatron.core.models.mimo.transformer.context_parallel_attention import (
            ContextParallelAttention,
        )
        from megatron.core.packed_seq_params import PackedSeqParams
        from megatron.core.process_groups_config import ProcessGroupCollection
        from megatron.core.transformer.enums import AttnMaskType

        packed, cp = None, 1 if self.cp_group is None else self.cp_group.size()
        if qkv_format == "thd":
            assert attn_mask_type == "padding_causal"
            assert query_layer.dim() == 3
            # Else it compares real and padded lengths on the device.
            assert pad_between_seqs is True
            cu_seqlens_q_padded = ends[2]
            for each in ends:
                assert each.dtype == torch.int32
                assert each.dim() == 1
                assert each.device == query_layer.device
            lengths = cu_seqlens_q_padded.diff()
            assert (lengths % (2 * cp) == 0).all()
            assert lengths.max() <= max_seqlen_q == max_seqlen_kv
            assert cu_seqlens_q_padded[-1] == cp * query_layer.size(0)
            names = ("cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded")
            packed = PackedSeqParams(qkv_format="thd", **dict(zip(names, ends, strict=True)))
            checked.append("thd")
        config = self.config  # TEDotProductAttention's
        groups = ProcessGroupCollection(cp=self.cp_group)
        inner = ContextParallelAttention(
            config, 1, AttnMaskType.causal, "self", pg_collection=groups
        )
        return inner(query_layer, key_layer, value_layer, None, packed_seq_params=packed)


def thd_get_partitioned_indices(
    cu_seqlens: Tensor, total_tokens: int, world_size: int, rank: int
) -> Tensor:
    """TE's index kernel: int32 lengths in, int32 places out."""
    from megatron.core.models.mimo.partition.sequence_order import packed_positions

    assert cu_seqlens.dtype == torch.int32
    assert cu_seqlens.dim() == 1
    assert cu_seqlens.device == device.device
    with device.noted():
        bounds = cu_seqlens.tolist()
    assert bounds[-1] == total_tokens
    checked.append("index")
    return device.upload(
        torch.tensor(packed_positions(bounds, rank, world_size), dtype=torch.int32)
    )


def install() -> None:
    """Put the stand-ins where Megatron-Core imports Transformer Engine from."""
    from unittest.mock import MagicMock

    def module(name: str, **parts: Any) -> types.ModuleType:
        made = types.ModuleType(name)
        made.__spec__ = importlib.machinery.ModuleSpec(name, None)
        for key, value in parts.items():
            setattr(made, key, value)
        sys.modules[name] = made
        return made

    tracker = type("CudaRNGStatesTracker", (), {})
    recipe = module("transformer_engine.common.recipe", DelayedScaling=type("Scaling", (), {}))
    pytorch = module(
        "transformer_engine.pytorch",
        Linear=Linear,
        LayerNormLinear=LayerNormLinear,
        GroupedLinear=type("GroupedLinear", (nn.Module,), {}),
        RMSNorm=RMSNorm,
        LayerNorm=RMSNorm,
        DotProductAttention=DotProductAttention,
        distributed=types.SimpleNamespace(CudaRNGStatesTracker=tracker),
    )
    module("transformer_engine.pytorch.fp8", FP8GlobalStateManager=MagicMock(),
           fp8_autocast=MagicMock(), fp8_model_init=MagicMock())  # fmt: skip
    # Of fp8, which no test here uses.
    quantized = type("Float8Tensor", (), {})
    module("transformer_engine.pytorch.float8_tensor", Float8Tensor=quantized)
    module("transformer_engine.pytorch.cpp_extensions", cast_to_fp8=None)
    common = module("transformer_engine.common", recipe=recipe)
    module("transformer_engine", __version__=VERSION, pytorch=pytorch, common=common)
    module("transformer_engine_torch", thd_get_partitioned_indices=thd_get_partitioned_indices)


LENGTHS, PADDED = (5, 11, 1, 8), (8, 12, 4, 8)
VOCABULARY = 32


def build(cp: int, config: Any, te_attention: bool = True) -> nn.Module:
    """A GPT of TE layers, the same weights on every rank and for every CP size."""
    from megatron.core.models.mimo.training.groups import create_process_groups, make_grid
    from megatron.core.models.mimo.transformer import layer_specs
    from megatron.core.models.mimo.transformer.exact_loss import ExactLossGPTModel

    rank = torch.distributed.get_rank()
    grid = make_grid(cp=cp, rank_offset=0 if cp > 1 else rank)
    layer_specs.use_transformer_engine = lambda: True
    # The comparison is in fp32, in which TE itself has no attention over CP.
    layer_specs.te_attends = lambda _: te_attention
    model = ExactLossGPTModel(
        config,
        layer_specs.language_layer_spec(config),
        vocab_size=VOCABULARY,
        max_sequence_length=64,
        position_embedding_type="rope",
        pg_collection=create_process_groups(grid),
    )
    generator = torch.Generator().manual_seed(3)
    for _, parameter in sorted(model.named_parameters()):
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def run_packed(
    model: nn.Module, ids: Tensor, labels: Tensor, mask: Tensor, cp_group: Any
) -> Tensor:
    """Sum of the counted losses of this CP rank's part of the packed sequences; its backward."""
    from megatron.core.models.mimo import compat
    from megatron.core.models.mimo.partition import utils
    from tests.harness.host_waits import PlayedDevice

    global device
    device = PlayedDevice()
    device.hold(model)
    ids, labels, mask = (device.upload(each) for each in (ids, labels, mask))

    real, padded = (torch.tensor([0, *each]).cumsum(0) for each in (LENGTHS, PADDED))
    params = compat.packed_seq_params(
        {
            "cu_seqlens_q": real,
            "cu_seqlens_kv": real,
            "cu_seqlens_q_padded": padded,
            "cu_seqlens_kv_padded": padded,
            "max_seqlen_q": max(PADDED),
            "max_seqlen_kv": max(PADDED),
        }
    )
    utils._kernel_applies = lambda device: True
    adapter = utils.PartitionAdapter(
        utils.PartitionConfig(False, True, False, 64, "thd", cp_group=cp_group)
    )
    with device.watch():
        embedded = model.embedding(ids, None)
        embedded, labels, mask, params = adapter.shard(embedded, labels, mask, params)
        losses = model(None, None, None, decoder_input=embedded, labels=labels,
                       packed_seq_params=params)  # fmt: skip
        loss = (losses * mask).sum()
        loss.backward()
    assert not device.host_waits, [str(each) for each in device.host_waits]
    device = None
    return loss


def main() -> None:
    """See the module."""
    import torch.distributed as dist

    import megatron.core.models.mimo  # noqa: F401  stock modules on CPU
    from megatron.core.extensions.transformer_engine import TEDotProductAttention
    from megatron.core.models.mimo.randomness import seed_everything
    from megatron.core.models.mimo.transformer.context_parallel_attention import (
        ContextParallelAttention,
    )
    from megatron.core.transformer.transformer_config import TransformerConfig

    dist.init_process_group("gloo")
    seed_everything(1)
    TEDotProductAttention.cp_stream = object()

    def config(cp: int) -> TransformerConfig:
        return TransformerConfig(
            num_layers=2, hidden_size=16, num_attention_heads=4, num_query_groups=2,
            ffn_hidden_size=32, gated_linear_unit=True, normalization="RMSNorm",
            activation_func=nn.functional.silu, add_bias_linear=False, attention_dropout=0.0,
            hidden_dropout=0.0, context_parallel_size=cp, use_cpu_initialization=True,
            masked_softmax_fusion=False, bias_dropout_fusion=False, bias_activation_fusion=False,
            gradient_accumulation_fusion=False,
        )  # fmt: skip

    generator = torch.Generator().manual_seed(9)
    samples = [torch.randint(VOCABULARY, (2, 1, n), generator=generator) for n in LENGTHS]
    rows = [
        nn.functional.pad(each, (0, padded - each.size(-1)))
        for each, padded in zip(samples, PADDED, strict=True)
    ]
    ids, labels = torch.cat(rows, dim=-1)
    mask = torch.cat(
        [(torch.arange(padded) < n).float() for n, padded in zip(LENGTHS, PADDED, strict=True)]
    )[None]

    alone = build(1, config(1))
    expected = sum(
        alone(own, torch.arange(own.size(1))[None], None, labels=wanted).sum()
        for own, wanted in samples
    )
    expected.backward()
    wanted = dict(alone.named_parameters())
    # TE's attention, and this project's in TE's layers.
    for attention in (TEDotProductAttention, ContextParallelAttention):
        before = len(checked)
        cut = build(2, config(2), attention is TEDotProductAttention)
        assert isinstance(cut.decoder.layers[0].self_attention.core_attention, attention)
        loss = run_packed(cut, ids, labels, mask, dist.group.WORLD)
        total = loss.detach()
        dist.all_reduce(total)
        torch.testing.assert_close(total, expected.detach(), rtol=1e-5, atol=1e-5)
        for name, parameter in cut.named_parameters():
            dist.all_reduce(parameter.grad)
            torch.testing.assert_close(parameter.grad, wanted[name].grad, rtol=1e-4, atol=1e-5)
        if dist.get_rank() == 0:
            print("TE CALLS", sorted(set(checked[before:])), len(checked) - before)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    install()
    main()
