# SPDX-License-Identifier: Apache-2.0
"""A causal language model of transformers in the place of Megatron's GPT."""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate

from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.models.mimo.torch_native.agreed import judged_together
from megatron.core.models.mimo.torch_native.context_parallel import (
    check_one_sequence,
    own_chunks,
)
from megatron.core.models.mimo.torch_native.loss import cross_entropy
from megatron.core.models.mimo.torch_native.meshes import FSDP, mesh_in
from megatron.core.models.mimo.torch_native.parallelize import parallelize
from megatron.core.models.mimo.torch_native.part import TorchNativePart
from megatron.core.models.mimo.torch_native.plans import Plan
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

# The name under which a sharded model embeds tokens without a forward pass.
_EMBED = "embed_for_mimo"


class TorchNativeLanguageModel(TorchNativePart, MegatronModule):
    """What ``MimoModel`` asks of a language model, of one of transformers'.

    Megatron's ``TransformerConfig`` says nothing of its layers; sizes must be the model's.

    Args:
        config: Megatron's, with ``hidden_size`` of the model, CP of the grid and no pipeline or
            SP: PyTorch cuts the sequence over TP within the model.
        source: a model folder, a configuration of transformers (weights are drawn) or a model.
        grid: the language model's.
        plan: how it is split; None takes its family's.
        precision: in which it computes, such as ``torch.bfloat16``; its weights stay fp32.
        sequence_parallel: norms and residuals on 1/tp of the sequence.
        activation_checkpointing: compute blocks again in backward.
        pg_collection: groups of the grid, for checkpoints.

    Attributes:
        model: transformers' own.
        embedding: embeds tokens, as Megatron's does.
        vocab_size: of its logits.

    Raises:
        ValueError: the configuration asks for what the model cannot do, or has other sizes.
    """

    def __init__(
        self,
        config: TransformerConfig,
        source: str | Path | nn.Module | Any,
        grid: HyperCommGrid,
        *,
        plan: Plan | None = None,
        precision: torch.dtype | None = None,
        sequence_parallel: bool = True,
        activation_checkpointing: bool = False,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config)
        self.pg_collection = pg_collection
        self.model: Any = _built(source)
        self._grid = (grid, plan)
        self.precision = precision
        self._settings = {
            "precision": precision,
            "sequence_parallel": sequence_parallel,
            "activation_checkpointing": activation_checkpointing,
        }
        self.vocab_size: int = self.model.config.vocab_size
        self.initial_std = self.model.config.initializer_range
        _check_config(config, self.model.config)
        self.embedding = TokenEmbedding(self)

    def check_options(self, options: Any) -> None:
        """Refuse what a whole model is to do and this one cannot.

        Args:
            options: the ``MimoModelConfig``.

        Raises:
            ValueError: packed sequences; rows that are added after layers.
        """
        if options.kv_format != "sbhd":
            raise ValueError(
                f"kv_format={options.kv_format!r}: attention of a torch-native language model does "
                "not read cu_seqlens; give kv_format='sbhd', or take Megatron's layers"
            )
        if getattr(options, "deepstack_layers", None):
            raise ValueError(
                f"deepstack_layers={options.deepstack_layers}: layers of a torch-native language "
                "model add no levels of rows; leave them out, or take Megatron's layers"
            )

    def shard(self) -> None:
        """Shard the model over TP and FSDP; see :meth:`.TorchNativePart.shard`."""
        grid, plan = self._grid
        # Whoever calls a language model under CP has cut the sequence.
        parallelize(self.model, grid, plan=plan, cut_sequence=False, **self._settings)
        setattr(self.model, _EMBED, types.MethodType(_embed, self.model))
        model = self.model
        if isinstance(model, nn.Module) and isinstance(model, FSDPModule):
            register_fsdp_forward_method(model, _EMBED)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Embed tokens ``(B, S)``: ``(B, S, H)``, the same on all TP ranks."""
        return _whole(getattr(self.model, _EMBED, types.MethodType(_embed, self.model))(input_ids))

    def forward(
        self,
        input_ids: Tensor | None,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        decoder_input: Tensor | None = None,
        labels: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Run the model over a fused sequence.

        Args:
            input_ids: ``(B, S/cp)``, read where there is no ``decoder_input``.
            position_ids: ``(B, S)``, not cut; None counts from 0.
            attention_mask: bool, True where attention is forbidden, ``(B or 1, 1, S, S)``; None
                masks causally. None with CP.
            decoder_input: ``(S/cp, B, H)``, the same on all TP ranks.
            labels: ``(B, S/cp)``.
            packed_seq_params: must be None.

        Returns:
            With labels the loss per token, fp32 ``(B, S/cp)``; else logits ``(B, S/cp, V/tp)`` of
            this rank's part of the vocabulary, with the lowest number in columns that no token has.

        Raises:
            ValueError: packed sequences, position ids of several axes, a mask of another form.
        """
        _check_inputs(position_ids, attention_mask, packed_seq_params)
        if decoder_input is None:
            assert input_ids is not None
            embedded = self.embed(input_ids)
        else:
            embedded = decoder_input.transpose(0, 1)
        logits = self.model(
            inputs_embeds=embedded,
            position_ids=self._own_positions(position_ids, *embedded.shape[:2]),
            attention_mask=None if attention_mask is None else _additive(attention_mask, embedded),
            use_cache=False,
        ).logits
        if labels is None:
            return _own_columns(logits)
        return cross_entropy(logits, labels, reduction="none")

    def _own_positions(self, whole: Tensor | None, samples: int, length: int) -> Tensor | None:
        """The positions of this CP rank's tokens, of which a sample has so many."""
        cp = self.config.context_parallel_size
        if cp == 1:
            return whole
        device, group = next(self.model.parameters()).device, self._grid[0].get_pg("cp")
        counted = torch.arange(length * cp, device=device).expand(samples, -1)
        positions = counted if whole is None else whole

        def judged() -> Tensor:
            # The whole: a boundary may lie in the chunks of some ranks only.
            check_one_sequence(positions)
            return own_chunks(positions, group)

        return judged_together(judged, mesh_in(self.model).get_group(FSDP), device)


class TokenEmbedding(nn.Module):
    """A language model's embedding, called as Megatron's is; the weight stays the model's.

    Args:
        owner: the language model.
    """

    def __init__(self, owner: TorchNativeLanguageModel) -> None:
        super().__init__()
        self._owner = (owner,)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Yield the weight."""
        return self._owner[0].model.get_input_embeddings().parameters(recurse)

    @property
    def output_dtype(self) -> torch.dtype:
        """What the embedding computes in."""
        return self._owner[0].precision or next(self.parameters()).dtype

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Embed ``(B, S)``: ``(S, B, H)``. Positions are the attention's concern.

        A rank without any token takes part in what gathers the weight.
        """
        if input_ids.numel():
            return self._owner[0].embed(input_ids).transpose(0, 1)
        one = self._owner[0].embed(input_ids.new_zeros(1, 1))[:0]
        return one.reshape(input_ids.shape[1], input_ids.shape[0], one.shape[-1])


def _built(source: Any) -> nn.Module:
    if isinstance(source, nn.Module):
        return source
    from transformers import AutoModelForCausalLM

    if isinstance(source, (str, Path)):
        return AutoModelForCausalLM.from_pretrained(str(source), dtype=torch.float32)
    return AutoModelForCausalLM.from_config(source, dtype=torch.float32)


def _check_config(config: TransformerConfig, own: Any) -> None:
    if config.hidden_size != own.hidden_size:
        raise ValueError(
            f"the language config has hidden_size {config.hidden_size}, the model of transformers "
            f"{own.hidden_size}; give the model's"
        )
    stages = config.pipeline_model_parallel_size
    if stages > 1:
        raise ValueError(
            f"pipeline_model_parallel_size={stages}: a torch-native language model is cut over TP, "
            "CP and DP; give those ranks to them, or take Megatron's layers"
        )
    if config.sequence_parallel:
        raise ValueError(
            "the language config has sequence_parallel=True, but a torch-native language model "
            "takes whole sequences and cuts them itself; set it to False, and sequence_parallel "
            "of TorchNativeLanguageModel as wanted"
        )


def _check_inputs(positions: Tensor | None, mask: Tensor | None, packed: Any) -> None:
    if packed is not None:
        raise ValueError(
            "packing_kwargs is given, and attention of a torch-native language model does not "
            "read cu_seqlens; pad samples to one length"
        )
    if positions is not None and positions.ndim != 2:
        raise ValueError(
            f"position_ids must be (B, S) for a torch-native language model, got "
            f"{tuple(positions.shape)}; multimodal rotary positions are of Megatron's layers"
        )
    if mask is not None and (mask.dtype != torch.bool or mask.ndim != 4):
        raise ValueError(
            "attention_mask must be bool, True where attention is forbidden, of shape "
            f"(B or 1, 1, S, S), got {mask.dtype} of shape {tuple(mask.shape)}"
        )


def _additive(forbidden: Tensor, like: Tensor) -> Tensor:
    """The form that every attention of transformers adds to its scores."""
    lowest = torch.finfo(like.dtype).min
    return torch.zeros_like(forbidden, dtype=like.dtype).masked_fill(forbidden, lowest)


def _embed(model: Any, input_ids: Tensor) -> Tensor:
    return model.get_input_embeddings()(input_ids)


def _whole(value: Tensor) -> Tensor:
    if isinstance(value, DTensor):
        return value.redistribute(value.device_mesh, [Replicate()]).to_local()
    return value


def _own_columns(logits: Tensor) -> Tensor:
    """This rank's part of the vocabulary, as wide as every other's."""
    if not isinstance(logits, DTensor):
        return logits
    width = -(-logits.shape[-1] // logits.device_mesh.size())
    own = logits.to_local()
    missing = width - own.shape[-1]
    return nn.functional.pad(own, (0, missing), value=torch.finfo(own.dtype).min)
