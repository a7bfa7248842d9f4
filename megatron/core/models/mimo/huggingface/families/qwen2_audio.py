# SPDX-License-Identifier: Apache-2.0
"""Qwen2-Audio: Whisper's encoder with pooled rows, a linear projector, and a language model."""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any

from megatron.core.models.mimo.huggingface.composites import (
    COMPOSITES,
    Composite,
    EncoderPart,
    LanguagePart,
    decoder_family,
)
from megatron.core.models.mimo.huggingface.cuts import Along
from megatron.core.models.mimo.huggingface.families import whisper
from megatron.core.models.mimo.huggingface.family import Family, check_fields
from megatron.core.models.mimo.huggingface.tables import Table, line
from megatron.core.models.mimo.submodules.audio import AudioModalitySubmodules
from megatron.core.models.mimo.towers.whisper import WhisperEncoder, rows_per_sound
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

MODALITY, ENCODER = "audio", "whisper"
TOWER, _PROJECTOR = "audio_tower.", "multi_modal_projector."
_MODEL, _OUTPUT = "model.", "lm_head."


def _table(_config: Any) -> Table:
    projector = tuple(
        line(f"input_projections.0.{kind}", f"{_PROJECTOR}linear.{kind}", Along(0))
        for kind in ("weight", "bias")
    )
    return whisper.table(f"encoders.{ENCODER}.", TOWER) + Table(projector)


def projector_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Return the projector's tensors in a folder, and their shapes."""
    hidden, width = config.text_config.hidden_size, config.audio_config.d_model
    return {f"{_PROJECTOR}linear.weight": (hidden, width), f"{_PROJECTOR}linear.bias": (hidden,)}


_FAMILY = Family(
    model_types=("qwen2_audio_encoder",),
    settings=whisper.settings,
    params=lambda _config: {},
    table=_table,
    reads=whisper.READ,
    ignores=whisper.UNUSED_FIELDS,
    refuses=whisper.REFUSED,
)


def _spec(
    tower: Any, config: TransformerConfig, groups: ProcessGroupCollection, language_hidden: int
) -> ModuleSpec:
    """The modality: the encoder and a linear layer to the language model's width."""
    encoder = ModuleSpec(
        module=WhisperEncoder,
        params={
            "config": config,
            "pg_collection": groups,
            "mel_bins": tower.num_mel_bins,
            "positions": tower.max_source_positions,
            "pooled": True,
        },
    )
    # Stock's affine projector adds a bias that is not gathered over TP.
    projector = ModuleSpec(
        module=ColumnParallelLinear,
        params={
            "input_size": config.hidden_size,
            "output_size": language_hidden,
            "config": dataclasses.replace(config, sequence_parallel=False),
            "init_method": config.init_method,
            "gather_output": True,
            "tp_group": groups.tp,
        },
    )
    rows = functools.partial(rows_per_sound, pooled=True)
    return ModuleSpec(
        module=AudioModalitySubmodules,
        params={"pg_collection": groups, "rows_per_item": {ENCODER: rows}},
        submodules={"encoders": {ENCODER: encoder}, "input_projections": [projector]},
    )


def qwen2_audio(config: Any) -> Composite:
    """Return what a Qwen2-Audio is made of.

    Raises:
        UnsupportedModelError: a part is not known, or a setting is not supported.
    """
    check_fields(config, frozenset(["audio_config", "text_config", "audio_token_index"]))
    text = copy.deepcopy(config.text_config)
    # The output layer of the whole model is its own, whatever this says.
    text.tie_word_embeddings = False
    language = LanguagePart(
        text,
        decoder_family(text),
        (
            {_MODEL: "language_model.model.", _OUTPUT: "language_model.lm_head."},
            {_MODEL: "model.language_model."},
        ),
    )
    sounds = EncoderPart(
        modality=MODALITY,
        name=ENCODER,
        token_id=config.audio_token_id,
        inputs=("input_features", "feature_attention_mask"),
        spec=functools.partial(_spec, config.audio_config),
        family=_FAMILY,
        config=config.audio_config,
        spellings=({}, {TOWER: _MODEL + TOWER, _PROJECTOR: _MODEL + _PROJECTOR}),
        sequence_parallel=True,
    )
    return Composite(language, (sounds,))


COMPOSITES["qwen2_audio"] = qwen2_audio
