# SPDX-License-Identifier: Apache-2.0
"""The model of the digits job: small encoders of images and of sounds feeding a small GPT.

All are stock Megatron-Core modules over their own process groups; ``MimoModel`` joins them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from examples.mimo.digits.data import SEQUENCE_LENGTH, TOKENS_PER_DIGIT, VOCABULARY_SIZE, Token
from examples.mimo.digits.images import PATCH_SIDE, TOKENS_PER_IMAGE, image_patches
from examples.mimo.digits.options import FREEZABLE, HEADS, Options
from examples.mimo.digits.sounds import BANDS, FRAMES, FRAMES_PER_TOKEN, check_spectra
from megatron.core.models.mimo import (
    AudioModalitySubmodules,
    MimoModel,
    MimoModelConfig,
    VisionModalitySubmodules,
)
from megatron.core.models.mimo.job import settings
from megatron.core.models.mimo.job.built_model import (
    LANGUAGE,
    BuiltModel,
    finish_model,
    freeze_parts,
)
from megatron.core.models.mimo.memory.layer_recompute import recomputable
from megatron.core.models.mimo.memory.policy import EncoderMemory
from megatron.core.models.mimo.randomness import seed_everything
from megatron.core.models.mimo.training.groups import create_process_groups
from megatron.core.models.mimo.transformer.exact_loss import ExactLossGPTModel
from megatron.core.models.mimo.transformer.layer_specs import encoder_layer_spec
from megatron.core.models.mimo.transformer.ulysses_attention import ItemParts
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig

ENCODER = "digits"
"""Name of a modality's encoder."""
ENCODER_WIDTH, ENCODER_LAYERS, LANGUAGE_WIDTH = 64, 2, 128


class PatchEncoder(MegatronModule):
    """Linear layer, learnt positions and a transformer over patches; sequence first.

    Args:
        config: of the transformer.
        pg_collection: of the modality's grid.
    """

    cuts_items = True
    patches, patch_size, patches_per_row = 0, 0, 1

    def __init__(self, config: TransformerConfig, pg_collection: ProcessGroupCollection) -> None:
        super().__init__(config=config)
        width, dtype = config.hidden_size, config.params_dtype
        self.patch_embedding = torch.nn.Linear(self.patch_size, width)
        self.position_embedding = torch.nn.Parameter(torch.zeros(self.patches, 1, width))
        self.transformer = TransformerBlock(
            config, encoder_layer_spec(config, items_cut=True), pg_collection=pg_collection
        )
        self.cp_group = pg_collection.cp
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

    patches, patch_size = TOKENS_PER_IMAGE, PATCH_SIDE * PATCH_SIDE

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Encode images; raises ``ValueError`` for images of another shape."""
        return self.encode(image_patches(images))


class SpeechEncoder(PatchEncoder):
    """Over the 16 frames of a sound, the mean of four each; ``(n, 16, 20)`` -> ``(4, n, h)``."""

    patches, patch_size, patches_per_row = FRAMES, BANDS, FRAMES_PER_TOKEN

    def forward(self, spectra: torch.Tensor) -> torch.Tensor:
        """Encode sounds; raises ``ValueError`` for spectra of another shape."""
        check_spectra(spectra)
        return self.encode(spectra).unflatten(0, (-1, FRAMES_PER_TOKEN)).mean(dim=1)


@dataclass(frozen=True)
class Modality:
    """What tells a modality from the others."""

    side: str  # its name on the command line
    token: Token  # stands for one row of its encoder's output
    submodule: type
    encoder: type[PatchEncoder]
    input_name: str  # argument of the encoder's forward

    def inputs(self, tensor: torch.Tensor) -> dict[str, Any] | None:
        """``modality_inputs`` of the modality; None without any item."""
        return {ENCODER: {self.input_name: tensor}} if len(tensor) else None

    def rows(self, inputs: Mapping[str, Any]) -> list[int]:
        """Rows of each whole item, from the arguments of the encoder's forward."""
        return [TOKENS_PER_DIGIT] * len(inputs[self.input_name])


MODALITIES = {
    "images": Modality("vision", Token.IMAGE, VisionModalitySubmodules, DigitEncoder, "images"),
    "audio": Modality("audio", Token.SOUND, AudioModalitySubmodules, SpeechEncoder, "spectra"),
}


def _encoder_spec(modality: str, options: Options, groups: ProcessGroupCollection) -> ModuleSpec:
    """A modality's encoder and its projector to the language model's width."""
    kind = MODALITIES[modality]
    common = settings.transformer_settings(options.encoders[kind.side], options)
    projector = _config(1, LANGUAGE_WIDTH, ffn_hidden_size=LANGUAGE_WIDTH, **common)
    cp = options.encoders[kind.side].cp
    config = _config(ENCODER_LAYERS, ENCODER_WIDTH, context_parallel_size=cp, **common)
    encoder = ModuleSpec(kind.encoder, params={"config": config, "pg_collection": groups})
    projection = settings.projector_spec(projector, ENCODER_WIDTH, groups.tp)
    return ModuleSpec(
        module=kind.submodule,
        params={
            "pg_collection": groups,
            "sequence_first_encoders": [ENCODER],
            "rows_per_item": {ENCODER: kind.rows},
        },
        submodules={"encoders": {ENCODER: encoder}, "input_projections": [projection]},
    )


def _config(layers: int, width: int, **more: Any) -> TransformerConfig:
    return TransformerConfig(
        num_layers=layers,
        hidden_size=width,
        num_attention_heads=HEADS,
        # Larger than Megatron's default of 0.02, which is meant for widths of thousands.
        init_method_std=0.08,
        add_bias_linear=False,
        **more,
    )


def _language_config(options: Options) -> TransformerConfig:
    own = settings.language_settings(options, lengths_differ=options.varied_samples)
    return _config(
        own.pop("num_layers"),
        LANGUAGE_WIDTH,
        num_query_groups=HEADS,
        ffn_hidden_size=2 * LANGUAGE_WIDTH,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        normalization="RMSNorm",
        **own,
        **settings.transformer_settings(options.language, options),
    )


def build_model(options: Options, backend: str | None = None) -> BuiltModel:
    """Build, initialise and wrap the model; every rank calls it together.

    Args:
        options: of the job.
        backend: of the process groups, PyTorch's default one if None.
    """
    sides = {name: kind.side for name, kind in MODALITIES.items()}
    layouts = {"images": options.vision, LANGUAGE: options.language, "audio": options.audio}
    there = {name: layout for name, layout in layouts.items() if layout}
    grids = settings.make_grids(there, options, backend)
    groups = {name: create_process_groups(grid) for name, grid in grids.items()}
    seed_everything(options.seed)
    config = _language_config(options)
    stage, *virtual = settings.language_specs(
        ExactLossGPTModel,
        config,
        groups[LANGUAGE],
        vocab_size=VOCABULARY_SIZE,
        max_sequence_length=SEQUENCE_LENGTH,
        position_embedding_type="rope",
    )
    specs = {
        name: _encoder_spec(name, options, groups[name]) for name in MODALITIES if name in grids
    }
    # The images are small, so that little would be worth a copy with the default.
    memory = EncoderMemory(options.encoder_memory, options.projector_memory, offload_from=1024)
    mimo_config = MimoModelConfig(
        language_model_spec=stage,
        virtual_stage_specs=virtual,
        modality_submodules_spec=specs,
        special_token_ids={name: int(MODALITIES[name].token) for name in specs},
        module_to_grid_map=grids,
        encoder_memory=dict.fromkeys(specs, memory),
        bridge=options.bridge,
        kv_format="thd" if options.packed else "sbhd",
    )
    model = MimoModel(mimo_config, cp_group=groups[LANGUAGE].cp, tp_group=groups[LANGUAGE].tp)
    configs = {LANGUAGE: config}
    for name, spec in specs.items():
        configs[name] = spec.submodules["encoders"][ENCODER].params["config"]
    return finish_model(
        model,
        grids,
        groups,
        configs,
        settings.ddp_config(options),
        seed=options.seed,
        freeze=lambda built: freeze_parts(built, FREEZABLE.parts(options.freeze), sides),
    )
