# SPDX-License-Identifier: Apache-2.0
"""The language side of the model: text rows, the fused sequence, and what it is cut into."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from megatron.core.models.mimo import compat
from megatron.core.models.mimo.comm.token_runs import count_mismatch
from megatron.core.models.mimo.model.encoder_side import (
    refuse_tokens_of_nothing,
    refuse_unknown_modalities,
)
from megatron.core.models.mimo.model.token_rows import TEXT, TokenRows
from megatron.core.models.mimo.partition.packed_lengths import check_packing, longest_sequence
from megatron.core.models.mimo.partition.utils import Sharded, cuts_as_ours
from megatron.core.models.mimo.stand_ins import TakesStandIns, model_method
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.utils import unwrap_model


class LanguageSide(TakesStandIns):
    """Mixin of :class:`MimoModel`: how text and modality rows become language-model input."""

    # The last batch's token positions, so that one forward pass looks for them once.
    _rows_memo: tuple[torch.Tensor, int, dict[str, int], TokenRows] | None = None

    # Why the batch that is being run, padding in the place of no samples, must not be.
    _padding_problem: str | None = None

    @model_method
    def get_text_embeddings(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None,
        special_token_ids: Mapping[str, int],
    ) -> torch.Tensor:
        """Embed the text tokens only: ``(T, H)``, in reading order of the batch.

        Args:
            input_ids: ``(B, S)``.
            position_ids: ``(B, S)``; ``(R, B, S)`` for multimodal rotary embeddings, whose first
                channel is the absolute position; or ``None``.
            special_token_ids: the tokens that are not text.

        Raises:
            RuntimeError: the embedding layer scatters for sequence parallelism itself.
        """
        self._refuse_embedding_scatter()
        text = self._token_rows(input_ids, special_token_ids).positions[TEXT]
        return self._embed_tokens(input_ids, position_ids, text)

    def _embed_tokens(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor | None, text: torch.Tensor
    ) -> torch.Tensor:
        """Embed the tokens at places ``text`` of the flattened ``(B * S)`` batch: ``(T, H)``."""
        positions = None
        if position_ids is not None:
            channel = position_ids[0] if position_ids.dim() == 3 else position_ids
            positions = channel.expand_as(input_ids).reshape(-1)[text].unsqueeze(0)
        embedded = unwrap_model(self.language_model).embedding(
            input_ids=input_ids.reshape(-1)[text].unsqueeze(0), position_ids=positions
        )
        return embedded.squeeze(1)

    def _fuse_gathered(
        self,
        rows: dict[str, torch.Tensor],
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None,
    ) -> torch.Tensor:
        """All rows of a replica and its text, ``(S, B, H)``; ``rows`` gets the text too.

        Raises:
            ValueError: as :meth:`align_embeddings_by_token_positions`; tokens without rows.
        """
        refuse_tokens_of_nothing(self._modality_tokens(input_ids), rows)
        rows[TEXT] = self.get_text_embeddings(input_ids, position_ids, self.special_token_ids)
        return self.align_embeddings_by_token_positions(
            modality_embeddings=rows,
            input_ids=input_ids,
            special_token_ids=self.special_token_ids,
        )

    @model_method
    def align_embeddings_by_token_positions(
        self,
        modality_embeddings: Mapping[str, torch.Tensor],
        input_ids: torch.Tensor,
        special_token_ids: Mapping[str, int],
    ) -> torch.Tensor:
        """Put text and modality rows where their tokens stand.

        Args:
            modality_embeddings: modality (or ``"text"``) -> rows ``(n, H)``, sample-major.
            input_ids: ``(B, S)``, or ``(S,)`` for one sample.
            special_token_ids: modality -> token id.

        Returns:
            ``(S, B, H)``, of the text rows' dtype. Tokens of a modality without rows are zeros.

        Raises:
            ValueError: no rows at all, a modality without a token id, a number of rows that is
                not the number of tokens, or rows of different widths.
        """
        if not modality_embeddings:
            raise ValueError("No modality embeddings provided. At least one modality is required.")
        if input_ids.dim() == 1:
            input_ids = input_ids.unsqueeze(0)
        refuse_unknown_modalities(modality_embeddings, special_token_ids)
        rows = self._token_rows(input_ids, special_token_ids)
        for name, embeddings in modality_embeddings.items():
            if rows.count(name) != embeddings.size(0):
                raise ValueError(count_mismatch(name, rows.count(name), embeddings.size(0)))
        return rows.place(modality_embeddings)

    def _token_rows(
        self, input_ids: torch.Tensor, special_token_ids: Mapping[str, int]
    ) -> TokenRows:
        """Token positions of a batch, looked for once per forward pass."""
        ids = dict(special_token_ids)
        version = -1 if input_ids.is_inference() else input_ids._version
        memo = self._rows_memo
        if memo is not None and memo[0] is input_ids and memo[1:3] == (version, ids):
            return memo[3]
        rows = TokenRows.find(input_ids, ids)
        self._rows_memo = (input_ids, version, ids, rows)
        return rows

    def _embedding_dtype(self) -> torch.dtype:
        """What the embedding layer returns; the same on all ranks, known before it runs."""
        config = self.mimo_config.language_model_spec.params["config"]
        if getattr(config, "fp32_residual_connection", False) is True:
            return torch.float32
        language_model = unwrap_model(self.language_model)
        # A later pipeline stage has no embedding; its first weight is of the same dtype.
        owner = getattr(language_model, "embedding", None) or language_model
        return next(owner.parameters()).dtype

    @model_method
    def _build_packed_seq_params(
        self, packing_kwargs: Mapping[str, Any] | None
    ) -> PackedSeqParams | None:
        """Packed-sequence parameters of a ``thd`` batch; ``None`` for a dense one.

        Raises:
            ValueError: unknown fields, or ``max_seqlen`` is left out and there are no lengths.
        """
        if packing_kwargs is None:
            return None
        packed = compat.packed_seq_params(packing_kwargs)
        for name in ("max_seqlen_q", "max_seqlen_kv"):
            if getattr(packed, name) is None:
                # Rotary embeddings are made for so many positions.
                setattr(packed, name, longest_sequence(packed))
        return packed

    def _check_batch(
        self, input_ids: torch.Tensor, packed: PackedSeqParams | None
    ) -> list[int] | None:
        """Refuse a batch that cannot be cut.

        A packed batch costs one copy of its cumulative lengths to the host, which Megatron's
        local layers need as well.

        Returns:
            The cumulative padded lengths of a packed batch under CP, else ``None``.

        Raises:
            SequenceShardError: a length or a shape that cannot be cut.
            ValueError: padding that may not stand for no samples.
        """
        if self._padding_problem is not None:
            raise ValueError(self._padding_problem)
        adapter = getattr(self, "partition_adapter", None)
        if adapter is None and isinstance(packed, PackedSeqParams):
            check_packing(packed, *input_ids.shape)
        # An adapter of the user's own knows what it can cut.
        return adapter.check(*input_ids.shape, packed) if cuts_as_ours(adapter) else None

    @model_method
    def _shard_language_inputs(
        self,
        embeddings: torch.Tensor | None,
        labels: torch.Tensor | None,
        loss_mask: torch.Tensor | None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Sharded:
        """Cut for CP and SP, see :meth:`PartitionAdapter.shard`; as it is without them."""
        if self.partition_adapter is None:
            return embeddings, labels, loss_mask, packed_seq_params
        return self.partition_adapter.shard(
            embeddings=embeddings,
            labels=labels,
            loss_mask=loss_mask,
            packed_seq_params=packed_seq_params,
        )

    def _partitioning(self, field: str) -> Any:
        """A field of the partition adapter's ``cfg``; ``None`` where there is none."""
        adapter = getattr(self, "partition_adapter", None)
        return getattr(getattr(adapter, "cfg", None), field, None)

    def _refuse_embedding_scatter(self) -> None:
        """Under SP the embedding layer must return all positions: modality rows come between.

        Raises:
            RuntimeError: the embedding layer scatters over TP.
        """
        if not self._partitioning("seq_parallel"):
            return
        embedding = getattr(unwrap_model(self.language_model), "embedding", None)
        if getattr(embedding, "scatter_to_sequence_parallel", False):
            raise RuntimeError(
                "MIMO sequence parallelism requires the language embedding scatter to be "
                "disabled: text and modality rows are fused first and scattered together. Build "
                "the language model with scatter_embedding_sequence_parallel=False."
            )

    def _drop_text_alike_over_tp(self) -> None:
        """Under SP, drop the same elements of the embedded text on all TP ranks.

        Megatron-Core draws them per TP rank there, which is right for an embedding that scatters.
        Here every TP rank embeds all text tokens and keeps its part later. An embedding's gradient
        goes to all ranks that hold a part of the vocabulary, through their own mask: with masks
        that differ it would be another function's.
        """
        if not self._partitioning("seq_parallel"):
            return
        embedding = getattr(unwrap_model(self.language_model), "embedding", None)
        dropout = getattr(embedding, "embedding_dropout", None)
        if not isinstance(dropout, nn.Dropout):
            return
        share, dropout.p = dropout.p, 0.0

        def drop(module: nn.Module, _args: Any, embedded: torch.Tensor) -> torch.Tensor:
            return nn.functional.dropout(embedded, share, module.training)

        embedding.register_forward_hook(drop)
