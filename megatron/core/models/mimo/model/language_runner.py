# SPDX-License-Identifier: Apache-2.0
"""Run the language model: embed the text, put rows among it, cut, call a stage."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup

from megatron.core.models.mimo import compat
from megatron.core.models.mimo.comm.plan.token_runs import count_mismatch
from megatron.core.models.mimo.memory.layer_recompute import recomputable
from megatron.core.models.mimo.model.attention_masks import check_mask
from megatron.core.models.mimo.model.deepstack import LevelRows, LevelSeats, check_stage
from megatron.core.models.mimo.model.input_checks import (
    check_modalities,
    check_tokens_have_modality,
)
from megatron.core.models.mimo.model.language_batch import LanguageBatch
from megatron.core.models.mimo.model.multimodal_rotary import rotary_positions_of
from megatron.core.models.mimo.model.rank_modules import RankModules
from megatron.core.models.mimo.model.replaceable import ReplaceableSteps
from megatron.core.models.mimo.model.token_positions import TEXT, LatestTokenPositions
from megatron.core.models.mimo.partition.packed_lengths import (
    check_packing,
    keep_lengths,
    longest_sequence,
    on_device,
    read_lengths,
)
from megatron.core.models.mimo.partition.utils import Sharded, cuts_as_ours
from megatron.core.models.mimo.transformer.host_lengths import reads_lengths_on_host
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.utils import unwrap_model
from mimo_colocated import phases


class LanguageRunner:
    """The language model of a rank, or its stages there.

    Args:
        modules: the rank's.
        steps: the model's replaceable ones.

    Attributes:
        token_positions: finds the token positions of a batch, once per forward pass.
    """

    def __init__(self, modules: RankModules, steps: ReplaceableSteps) -> None:
        self._modules, self._steps = modules, steps
        self.token_positions = LatestTokenPositions()
        self._seats: dict[nn.Module, LevelSeats] = {}

    # -- text ------------------------------------------------------------------------------

    def embed_text(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None,
        special_token_ids: Mapping[str, int],
    ) -> torch.Tensor:
        """Embed the text tokens only, see ``MimoModel.get_text_embeddings``."""
        text = self.token_positions.find(input_ids, special_token_ids).positions[TEXT]
        return self.embed_tokens(input_ids, position_ids, text)

    def embed_tokens(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor | None, text: torch.Tensor
    ) -> torch.Tensor:
        """Embed the tokens at places ``text`` of the flattened ``(B * S)`` batch: ``(T, H)``.

        Raises:
            RuntimeError: the embedding layer scatters for sequence parallelism itself.
        """
        self.check_embedding_does_not_scatter()
        positions = None
        if position_ids is not None:
            channel = position_ids[0] if position_ids.dim() == 3 else position_ids
            positions = channel.expand_as(input_ids).reshape(-1)[text].unsqueeze(0)
        embedded = unwrap_model(self._modules.language_model).embedding(
            input_ids=input_ids.reshape(-1)[text].unsqueeze(0), position_ids=positions
        )
        return embedded.squeeze(1)

    def embedding_dtype(self) -> torch.dtype:
        """Return what the embedding layer returns; the same on all ranks, known before it runs."""
        if getattr(self._modules.language_config, "fp32_residual_connection", False) is True:
            return torch.float32
        # A later pipeline stage has no embedding; its first weight is of the same dtype.
        owner = self.embedding or unwrap_model(self._modules.language_model)
        if isinstance(dtype := getattr(owner, "output_dtype", None), torch.dtype):
            return dtype  # not its weights': FSDP computes in another
        return next(owner.parameters()).dtype

    @property
    def embedding(self) -> Any:
        """What embeds the text; ``None`` on later stages."""
        return getattr(unwrap_model(self._modules.language_model), "embedding", None)

    def partitioning(self, field: str) -> Any:
        """Return a field of the partition adapter's ``cfg``; ``None`` where there is none."""
        return getattr(getattr(self._modules.partition_adapter, "cfg", None), field, None)

    # -- the fused sequence ----------------------------------------------------------------

    def count_tokens(self, input_ids: torch.Tensor) -> dict[str, int]:
        """Return the tokens per modality in this rank's language batch."""
        ids = self._modules.special_token_ids
        found = self.token_positions.find(input_ids, ids)
        return {name: found.count(name) for name in ids}

    def fuse(
        self,
        batch: LanguageBatch,
        rows: Mapping[str, torch.Tensor],
        elsewhere: Collection[str] = (),
    ) -> torch.Tensor:
        """Put all rows of a replica among its text: ``(S, B, H)``.

        Args:
            batch: the replica's.
            rows: modality -> rows ``(n, H)``, sample-major.
            elsewhere: modalities whose rows are put in later; their places are zeros.

        Raises:
            ValueError: as :meth:`align`; tokens without rows.
        """
        check_tokens_have_modality(self.count_tokens(batch.input_ids), {*rows, *elsewhere})
        ids = self._modules.special_token_ids
        text = self._steps.embed_text(batch.input_ids, batch.position_ids, ids)
        return self._steps.align(
            modality_embeddings={**rows, TEXT: text},
            input_ids=batch.input_ids,
            special_token_ids=ids,
        )

    def align(
        self,
        modality_embeddings: Mapping[str, torch.Tensor],
        input_ids: torch.Tensor,
        special_token_ids: Mapping[str, int],
    ) -> torch.Tensor:
        """Put rows where their tokens stand, see ``align_embeddings_by_token_positions``."""
        if not modality_embeddings:
            raise ValueError("No modality embeddings provided. At least one modality is required.")
        if input_ids.dim() == 1:
            input_ids = input_ids.unsqueeze(0)
        check_modalities(modality_embeddings, special_token_ids)
        rows = self.token_positions.find(input_ids, special_token_ids)
        for name, embeddings in modality_embeddings.items():
            if rows.count(name) != embeddings.size(0):
                raise ValueError(count_mismatch(name, rows.count(name), embeddings.size(0)))
        return rows.place(modality_embeddings)

    # -- cutting ---------------------------------------------------------------------------

    def pack(self, packing_kwargs: Mapping[str, Any] | None) -> PackedSeqParams | None:
        """Return packed-sequence parameters of a ``thd`` batch; ``None`` for a dense one.

        Their cumulative lengths are on the host, where the layers read them there, else on the
        device. Given on a device they are waited for once.

        Raises:
            ValueError: unknown fields, or ``max_seqlen`` is left out and there are no lengths.
        """
        if packing_kwargs is None:
            return None
        stages, lengths = self._modules.stages, read_lengths(packing_kwargs)
        on_host = bool(stages) and all(map(reads_lengths_on_host, stages))
        packed = compat.packed_seq_params({**packing_kwargs, **(lengths if on_host else {})})
        for own in (packing_kwargs, vars(packed)):  # others, if those were not int32
            keep_lengths([own[name] for name in lengths], list(lengths.values()))
        for name in ("max_seqlen_q", "max_seqlen_kv"):
            if getattr(packed, name) is None:
                # Rotary embeddings are made for so many positions.
                setattr(packed, name, longest_sequence(packed))
        models = [stage for stage in stages if isinstance(stage, nn.Module)]
        weight = None if on_host else next((p for m in models for p in m.parameters()), None)
        return packed if weight is None else on_device(packed, weight.device)

    def packed(self, batch: LanguageBatch) -> LanguageBatch:
        """Return the batch with its packed-sequence parameters."""
        return replace(batch, packed=self._steps.pack(batch.packing_kwargs))

    def check_mask(self, batch: LanguageBatch) -> None:
        """Refuse a mask that would not act on attention as it says.

        Raises:
            MaskError: see :func:`.check_mask`.
        """
        if batch.attention_mask is not None:
            use_cp = self.partitioning("use_cp") is True
            check_mask(self._modules.stages, use_cp, batch)

    def prepared(self, batch: LanguageBatch) -> LanguageBatch:
        """Return the batch packed and checked.

        Cumulative lengths of a packed batch that are on a device are waited for, once.

        Raises:
            SequenceShardError: a length or a shape that cannot be cut.
            ValueError: the batch has a problem; packing that is wrong.
        """
        batch = self.packed(batch)
        if batch.problem is not None:
            raise ValueError(batch.problem)
        adapter, lengths = self._modules.partition_adapter, None
        if adapter is None and isinstance(batch.packed, PackedSeqParams):
            check_packing(batch.packed, *batch.input_ids.shape)
        # An adapter of the user's own knows what it can cut.
        if cuts_as_ours(adapter):
            samples, length = batch.input_ids.shape
            lengths = adapter.check(samples, length, batch.packed)
        return replace(batch, lengths=lengths)

    def shard(
        self,
        embeddings: torch.Tensor | None,
        labels: torch.Tensor | None,
        loss_mask: torch.Tensor | None,
        packed: PackedSeqParams | None,
    ) -> Sharded:
        """Cut for CP and SP, see :meth:`.PartitionAdapter.shard`; as it is without them."""
        adapter = self._modules.partition_adapter
        if adapter is None:
            return embeddings, labels, loss_mask, packed
        return adapter.shard(
            embeddings=embeddings,
            labels=labels,
            loss_mask=loss_mask,
            packed_seq_params=packed,
        )

    def cut(self, batch: LanguageBatch, embeddings: torch.Tensor | None) -> Sharded:
        """Cut a batch and its fused sequence, which only a first stage has."""
        return self._steps.cut(
            embeddings=embeddings,
            labels=batch.labels,
            loss_mask=batch.loss_mask,
            packed_seq_params=batch.packed,
        )

    def tp_group(self) -> ProcessGroup:
        """Return the language model's TP group, also where the adapter in place has none."""
        group = self.partitioning("tp_group")
        return self._modules.language_grid.get_pg("tp") if group is None else group

    # -- the model -------------------------------------------------------------------------

    def call(
        self,
        batch: LanguageBatch,
        sharded: Sharded,
        stage: Any = None,
        levels: LevelRows | None = None,
    ) -> tuple[Any, torch.Tensor | None]:
        """Run the language model, or one stage of it.

        Args:
            batch: position ids and attention mask are read, which are not cut.
            sharded: what :meth:`cut` returned.
            stage: bare or wrapped; ``None`` for the first one of the rank.
            levels: that the stage's layers add.

        Returns:
            (output, loss mask as it was cut).
        """
        embeddings, labels, loss_mask, packed = sharded
        phases.mark(phases.LANGUAGE_FORWARD)
        stage = self._modules.language_model if stage is None else stage
        if embeddings is not None:
            embeddings = recomputable(embeddings, stage)
        use_cp = self.partitioning("use_cp")
        cp_group = self.partitioning("cp_group") if use_cp else None
        with rotary_positions_of(stage, packed, cp_group), self._adding(stage, levels) as further:
            output = stage(
                input_ids=None,
                # Not cut: multimodal rotary embeddings read them whole and cut by themselves.
                position_ids=batch.position_ids,
                decoder_input=embeddings,
                labels=labels,
                attention_mask=batch.attention_mask,
                packed_seq_params=packed,
                **further,
            )
        return phases.when_gradient_arrives(output, phases.LANGUAGE_BACKWARD), loss_mask

    # -- levels ----------------------------------------------------------------------------

    def seat_levels(self) -> None:
        """Let the layers that have a level add it; once, before anything wraps the model.

        Raises:
            ValueError: see :class:`.LevelSeats` and :func:`.check_stage`.
        """
        deepstack = self._modules.deepstack
        if deepstack.layers:
            layers = deepstack.all_layers
            self._seats = {
                unwrap_model(part): LevelSeats(part, layers) for part in self._modules.stages
            }
            check_stage(deepstack, self._modules.language_stage, self._seats.values())

    def level_layers(self, stage: nn.Module) -> tuple[int, ...]:
        """Return the layers of a stage after which levels are added, ascending."""
        seats = self._seats.get(unwrap_model(stage)) if self._seats else None
        return () if seats is None else seats.layers

    @contextmanager
    def _adding(
        self, stage: nn.Module, levels: LevelRows | None
    ) -> Iterator[dict[str, Any]]:
        """Arguments that have a stage add levels; afterwards it must have added them all."""
        if levels is None:
            yield {}
            return
        seats = self._seats[unwrap_model(stage)]
        seats.begin()
        yield levels.arguments()
        seats.check()

    def check_embedding_does_not_scatter(self) -> None:
        """Refuse an embedding that scatters: modality rows come between the text.

        Raises:
            RuntimeError: under SP the embedding layer scatters over TP.
        """
        if not self.partitioning("seq_parallel"):
            return
        if getattr(self.embedding, "scatter_to_sequence_parallel", False):
            raise RuntimeError(
                "MIMO sequence parallelism requires the language embedding scatter to be "
                "disabled: text and modality rows are fused first and scattered together. Build "
                "the language model with scatter_embedding_sequence_parallel=False."
            )

    def drop_text_alike_over_tp(self) -> None:
        """Under SP, drop the same elements of the embedded text on all TP ranks.

        Megatron-Core draws them per TP rank there, which is right for an embedding that scatters.
        Here every TP rank embeds all text tokens and keeps its part later. An embedding's gradient
        goes to all ranks that hold a part of the vocabulary, through their own mask: with masks
        that differ it would be another function's.
        """
        if not self.partitioning("seq_parallel"):
            return
        embedding = self.embedding
        dropout = getattr(embedding, "embedding_dropout", None)
        if not isinstance(dropout, nn.Dropout):
            return
        share, dropout.p = dropout.p, 0.0

        def drop(module: nn.Module, _args: Any, embedded: torch.Tensor) -> torch.Tensor:
            return nn.functional.dropout(embedded, share, module.training)

        embedding.register_forward_hook(drop)
