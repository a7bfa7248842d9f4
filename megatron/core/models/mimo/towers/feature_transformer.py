# SPDX-License-Identifier: Apache-2.0
"""Layers of a tower, up to the last hidden state that is used.

Hidden state ``d`` is what ``d`` layers make of the embeddings. A tower's output is one of them or
several side by side; layers above the last one are not built. Where hidden states are needed in
between, the layers are several blocks in a row, so that stock's own loop, with its recomputation,
runs each.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from megatron.core.models.mimo.memory.layer_recompute import recomputable
from megatron.core.models.mimo.partition.packed_lengths import end_to_end
from megatron.core.models.mimo.towers.sharded_list import ShardedModuleList
from megatron.core.models.mimo.transformer.layer_specs import encoder_layer_spec
from megatron.core.models.mimo.transformer.ulysses_attention import ItemParts
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig


@dataclass(frozen=True)
class Features:
    """Which hidden states of which rows a tower returns.

    Attributes:
        depths: of the hidden states, side by side in this order; 0 are the embeddings.
        first_row: of each image; 1 leaves out a class token.
        final_norm: the norm above all layers is part of the tower.
    """

    depths: tuple[int, ...]
    first_row: int = 0
    final_norm: bool = False

    @classmethod
    def of(cls, chosen: int | Sequence[int], layers: int, first_row: int = 0) -> Features:
        """Return features by hidden states as transformers counts them, negative ones from the end.

        >>> Features.of(-2, layers=24).depths, Features.of([-1, 6], layers=24).depths
        ((23,), (24, 6))

        Args:
            chosen: one hidden state or several.
            layers: of the whole tower, which has one hidden state more.
            first_row: as the attribute.

        Raises:
            ValueError: there is no such hidden state, or none that a layer has made.
        """
        numbers = [chosen] if isinstance(chosen, int) else list(chosen)
        wrong = [n for n in numbers if not -layers - 1 <= n <= layers]
        if wrong or not numbers:
            raise ValueError(
                f"a tower of {layers} layers has hidden states {-layers - 1} to {layers}, got "
                f"{chosen!r}"
            )
        depths = tuple(n % (layers + 1) for n in numbers)
        if not any(depths):
            raise ValueError(
                f"hidden state {chosen!r} of a tower of {layers} layers is its embeddings alone; "
                "choose one that a layer has made, from 1 or from the end"
            )
        return cls(depths, first_row)

    @property
    def layers(self) -> int:
        """How many layers are needed."""
        return max(self.depths)

    @property
    def blocks(self) -> list[tuple[int, int]]:
        """First layer of each block and the one after its last.

        >>> Features((23, 6, 0)).blocks
        [(0, 6), (6, 23)]
        """
        return list(pairwise(sorted({0, *self.depths})))


class FeatureTransformer(MegatronModule):
    """Bidirectional layers that return hidden states; images do not see each other.

    Under sequence parallelism, with CP, and for images of different sizes, rows of all images stand
    in one row of a packed batch, so no rows of padding are attended to. With CP a rank has its part
    of each image (:class:`.ItemParts`), without the rows before the features' first.

    Args:
        config: of the tower, with as many layers as the features need.
        pg_collection: of the modality's grid.
        features: what to return.
    """

    def __init__(
        self, config: TransformerConfig, pg_collection: ProcessGroupCollection, features: Features
    ) -> None:
        super().__init__(config=config)
        self.features = features
        self.tp_group, self.cp_group = pg_collection.tp, pg_collection.cp
        blocks = []
        for first, stop in features.blocks:
            own = copy.copy(config)
            own.num_layers = stop - first
            blocks.append(
                TransformerBlock(
                    own,
                    encoder_layer_spec(own, items_cut=True),
                    post_layer_norm=features.final_norm and stop == features.layers,
                    pg_collection=pg_collection,
                )
            )
        self.blocks = ShardedModuleList(blocks, pg_collection)

    def forward(self, hidden: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """Embeddings -> features of the rows from each image's first on.

        Args:
            hidden: ``(n, s, h)``; with ``lengths`` ``(t, h)``, image after image.
            lengths: rows of each image.

        Returns:
            ``(n, s, F * h)`` or ``(t, F * h)`` of ``F`` hidden states, of fewer rows where the
            features leave out the first ones or CP cuts images.
        """
        if lengths is None:
            images, rows = hidden.shape[:2]
            if not self.config.sequence_parallel and self.config.context_parallel_size == 1:
                out = self._hidden_states(hidden.transpose(0, 1).contiguous()).transpose(0, 1)
                return out[:, self.features.first_row :]
            out = self.forward(hidden.flatten(0, 1), [rows] * images)
            return out.unflatten(0, (images, len(out) // max(images, 1)))
        if self.config.context_parallel_size > 1:
            return self._part(hidden, lengths)
        out, first = self._packed(hidden, lengths), self.features.first_row
        return torch.cat([image[first:] for image in out.split(list(lengths))]) if first else out

    def _part(self, hidden: Tensor, lengths: Sequence[int]) -> Tensor:
        """This CP rank's rows ``(t_local, F * h)`` of whole images ``(t, h)``."""
        group, config = self.cp_group, self.config
        parts = ItemParts(tuple(lengths), group.size(), lead=self.features.first_row)
        multiple = self.tp_group.size() if config.sequence_parallel else 1
        return parts.run(self._hidden_states, hidden, group.rank(), multiple)

    def _packed(self, hidden: Tensor, lengths: Sequence[int]) -> Tensor:
        total, ranks = sum(lengths), self.tp_group.size()
        # A sequence of its own for what is missing to equal parts; nobody reads it.
        padding = -total % ranks if self.config.sequence_parallel else 0
        if padding:
            hidden = torch.nn.functional.pad(hidden, (0, 0, 0, padding))
            lengths = [*lengths, padding]
        packed = end_to_end(lengths)
        return self._hidden_states(hidden.unsqueeze(1), packed).squeeze(1)[:total]

    def _hidden_states(self, hidden: Tensor, packed: PackedSeqParams | None = None) -> Tensor:
        """``(s, b, h)`` -> ``(s, b, F * h)``; whole sequences on every TP rank, outside."""
        cut = self.config.sequence_parallel
        if cut:
            hidden = scatter_to_sequence_parallel_region(hidden, group=self.tp_group)
        found = {0: hidden}
        for block, (_, stop) in zip(self.blocks, self.features.blocks, strict=True):
            hidden = recomputable(hidden, block)
            hidden = block(hidden_states=hidden, attention_mask=None, packed_seq_params=packed)
            found[stop] = hidden
        out = torch.cat([found[depth] for depth in self.features.depths], dim=-1)
        if cut:
            # Every TP rank goes on with all rows and gets the whole gradient of each.
            out = gather_from_sequence_parallel_region(
                out, tensor_parallel_output_grad=False, group=self.tp_group
            )
        return out
