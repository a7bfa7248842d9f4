# SPDX-License-Identifier: Apache-2.0
"""Stock's methods for the steps of a forward pass, which users call and replace."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from megatron.core.models.mimo.config.base_configs import MimoModelConfig
from megatron.core.models.mimo.config.role import ModuleLayout, RankRole
from megatron.core.models.mimo.model import encoder_rank
from megatron.core.models.mimo.model.encoder_runner import empty_output, over_bridges
from megatron.core.models.mimo.model.language_runner import LanguageRunner
from megatron.core.models.mimo.model.rank_modules import RankModules
from megatron.core.models.mimo.model.replaceable import ReplaceableSteps
from megatron.core.models.mimo.partition.utils import Sharded
from megatron.core.models.mimo.stand_ins import TakesStandIns, model_method
from megatron.core.packed_seq_params import PackedSeqParams


class StockSteps(TakesStandIns):
    """Mixin of :class:`MimoModel`: stock's methods for the steps of a forward pass.

    The names that users call and replace; :class:`.ReplaceableSteps` looks them up.
    """

    _language: LanguageRunner
    _rank_modules: RankModules
    _steps: ReplaceableSteps
    mimo_config: MimoModelConfig
    role: RankRole
    special_token_ids: dict[str, int]

    @model_method
    def _attach_modality_split_sizes(
        self, output: torch.Tensor, input_ids: torch.Tensor | None, encoder_name: str
    ) -> None:
        """Note the rows per sample on an output, for stock's pipeline bridge."""
        token_id = self.special_token_ids.get(encoder_name)
        sizes = encoder_rank.split_sizes(token_id, output, input_ids)
        if sizes is not None:
            if self.role.mode is ModuleLayout.NON_COLOCATED:
                encoder_rank.check_fan_out(self.mimo_config.module_to_grid_map or {}, encoder_name)
            setattr(output, encoder_rank.SPLIT_SIZES, sizes)

    @model_method
    def _has_encoder_tokens(self, input_ids: torch.Tensor | None, encoder_name: str) -> bool:
        """See :func:`.has_encoder_tokens`."""
        token_id = self.special_token_ids.get(encoder_name)
        return encoder_rank.has_encoder_tokens(token_id, input_ids)

    @model_method
    def _empty_encoder_output(self, encoder_name: str) -> torch.Tensor:
        """See :func:`.empty_output`."""
        return empty_output(self._rank_modules, encoder_name)

    @model_method
    def _apply_colocated_comms(
        self, modality_embeddings: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """See :func:`.over_bridges`."""
        return over_bridges(self._rank_modules, modality_embeddings)

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
        return self._language.embed_text(input_ids, position_ids, special_token_ids)

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
        return self._language.align(modality_embeddings, input_ids, special_token_ids)

    @model_method
    def _build_packed_seq_params(
        self, packing_kwargs: Mapping[str, Any] | None
    ) -> PackedSeqParams | None:
        """See :meth:`.LanguageRunner.pack`."""
        return self._language.pack(packing_kwargs)

    @model_method
    def _shard_language_inputs(
        self,
        embeddings: torch.Tensor | None,
        labels: torch.Tensor | None,
        loss_mask: torch.Tensor | None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Sharded:
        """See :meth:`.LanguageRunner.shard`."""
        return self._language.shard(embeddings, labels, loss_mask, packed_seq_params)
