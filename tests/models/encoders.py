# SPDX-License-Identifier: Apache-2.0
"""The encoders of the proof models: small transformers over patches of images and frames of sounds.

Both are stock Megatron-Core blocks behind a linear layer; each has a projector of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from examples.mimo.digits.data import TOKENS_PER_DIGIT, Token
from examples.mimo.digits.images import PATCH_SIDE, TOKENS_PER_IMAGE, image_patches
from examples.mimo.digits.sounds import BANDS, FRAMES, FRAMES_PER_TOKEN, check_spectra
from megatron.core.models.mimo import AudioModalitySubmodules, VisionModalitySubmodules
from megatron.core.models.mimo.job.settings import projector_spec
from megatron.core.models.mimo.memory.layer_recompute import recomputable
from megatron.core.models.mimo.transformer.layer_specs import encoder_layer_spec
from megatron.core.models.mimo.transformer.ulysses_attention import ItemParts
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig

VISION, AUDIO = "images", "audio"
ENCODER = "digits"
"""Name of a modality's encoder."""


class PatchEncoder(MegatronModule):
    """Linear layer, learnt positions and a transformer; sequence first, as Megatron's blocks are.

    The submodule's spec says so and makes sample-major rows of what it returns.

    Args:
        config: of the transformer.
        pg_collection: of the modality's grid.
        patches: of an input.
        patch_size: numbers in a patch.
    """

    cuts_items = True
    patches_per_row = 1

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        patches: int,
        patch_size: int,
    ) -> None:
        super().__init__(config=config)
        self.patch_embedding = torch.nn.Linear(patch_size, config.hidden_size)
        self.position_embedding = torch.nn.Parameter(torch.zeros(patches, 1, config.hidden_size))
        self.transformer = TransformerBlock(
            config, encoder_layer_spec(config, items_cut=True), pg_collection=pg_collection
        )
        self.cp_group = pg_collection.cp
        dtype = config.params_dtype
        self.patch_embedding.to(dtype)
        self.position_embedding.data = self.position_embedding.data.to(dtype)

    def encode(self, patches: torch.Tensor) -> torch.Tensor:
        """Patches ``(n, patches, patch_size)`` -> ``(patches, n, h)``; with CP a part of them."""
        patches = patches.transpose(0, 1).to(self.patch_embedding.weight.dtype)
        hidden = self.patch_embedding(patches) + self.position_embedding
        if self.config.context_parallel_size > 1:
            return self._part(hidden)
        return self._layers(hidden)

    def _layers(
        self, hidden: torch.Tensor, packed: PackedSeqParams | None = None
    ) -> torch.Tensor:
        return self.transformer(
            hidden_states=recomputable(hidden, self.transformer),
            attention_mask=None,
            packed_seq_params=packed,
        )

    def _part(self, hidden: torch.Tensor) -> torch.Tensor:
        """This CP rank's part of each item: ``(patches, n, h)`` -> ``(patches of the part, n, h)``.

        Item by item in one packed row, so that no item needs to divide by the ranks.
        """
        patches, items = hidden.shape[:2]
        parts = ItemParts((patches,) * items, self.cp_group.size(), unit=self.patches_per_row)
        whole = hidden.transpose(0, 1).flatten(0, 1)
        rows = parts.run(self._layers, whole, self.cp_group.rank(), 1)
        return rows.unflatten(0, (items, len(rows) // items)).transpose(0, 1)

    def lower_half(self) -> list[torch.nn.Module | torch.nn.Parameter]:
        """The embeddings and the lower half of the layers."""
        layers = self.transformer.layers
        return [self.patch_embedding, self.position_embedding, *layers[: len(layers) // 2]]


class DigitEncoder(PatchEncoder):
    """Over the four 4x4 patches of an 8x8 image; ``(n, 1, 8, 8)`` -> ``(4, n, h)``."""

    def __init__(self, config: TransformerConfig, pg_collection: ProcessGroupCollection) -> None:
        super().__init__(config, pg_collection, TOKENS_PER_IMAGE, PATCH_SIDE * PATCH_SIDE)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Encode images; raises ``ValueError`` for images of another shape."""
        return self.encode(image_patches(images))


class SpeechEncoder(PatchEncoder):
    """Over the 16 frames of a sound, the mean of four each; ``(n, 16, 20)`` -> ``(4, n, h)``."""

    patches_per_row = FRAMES_PER_TOKEN

    def __init__(self, config: TransformerConfig, pg_collection: ProcessGroupCollection) -> None:
        super().__init__(config, pg_collection, FRAMES, BANDS)

    def forward(self, spectra: torch.Tensor) -> torch.Tensor:
        """Encode sounds.

        Raises:
            ValueError: for spectra of another shape.
        """
        check_spectra(spectra)
        return self.encode(spectra).unflatten(0, (-1, FRAMES_PER_TOKEN)).mean(dim=1)


@dataclass(frozen=True)
class Modality:
    """What tells a modality from the others.

    Attributes:
        side: its name on the command line.
        token: stands for one row of its encoder's output.
        submodule, encoder: classes.
        input_name: argument of the encoder's forward.
    """

    side: str
    token: Token
    submodule: type
    encoder: type[PatchEncoder]
    input_name: str

    def inputs(self, tensor: torch.Tensor) -> dict[str, Any] | None:
        """``modality_inputs`` of the modality; None without any item."""
        return {ENCODER: {self.input_name: tensor}} if len(tensor) else None

    def rows(self, inputs: Mapping[str, Any]) -> list[int]:
        """Rows of each whole item, from the arguments of the encoder's forward."""
        return [TOKENS_PER_DIGIT] * len(inputs[self.input_name])


MODALITIES = {
    VISION: Modality("vision", Token.IMAGE, VisionModalitySubmodules, DigitEncoder, "images"),
    AUDIO: Modality("audio", Token.SOUND, AudioModalitySubmodules, SpeechEncoder, "spectra"),
}


def projector_of(modality: str) -> str:
    """Name of the configuration of a modality's projector."""
    return f"{modality} projector"


def encoder_spec(
    modality: str, configs: dict[str, TransformerConfig], groups: ProcessGroupCollection
) -> ModuleSpec:
    """A modality's encoder and projector.

    Args:
        modality: ``VISION`` or ``AUDIO``.
        configs: of the modality and of its projector, by name.
        groups: of its grid.
    """
    kind = MODALITIES[modality]
    encoder = ModuleSpec(
        module=kind.encoder, params={"config": configs[modality], "pg_collection": groups}
    )
    projection = projector_spec(
        configs[projector_of(modality)], configs[modality].hidden_size, groups.tp
    )
    return ModuleSpec(
        module=kind.submodule,
        params={
            "pg_collection": groups,
            "sequence_first_encoders": [ENCODER],
            "rows_per_item": {ENCODER: kind.rows},
        },
        submodules={"encoders": {ENCODER: encoder}, "input_projections": [projection]},
    )
