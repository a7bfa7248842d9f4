# SPDX-License-Identifier: Apache-2.0
"""Qwen2.5-VL and Qwen3-VL: a tower over patches of any number, and a Qwen with 3-D positions."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from megatron.core.models.mimo.huggingface.composites import (
    COMPOSITES,
    Composite,
    EncoderPart,
    LanguagePart,
    decoder_family,
)
from megatron.core.models.mimo.huggingface.cuts import Along, Cut, FusedQKV, Gated, Whole
from megatron.core.models.mimo.huggingface.family import (
    Family,
    UnsupportedModelError,
    activation,
    check_fields,
    renamed,
)
from megatron.core.models.mimo.huggingface.tables import Line, Table, line
from megatron.core.models.mimo.submodules.vision import VisionModalitySubmodules
from megatron.core.models.mimo.towers.qwen_vision import QwenVisionShape, QwenVisionTower, runs_of
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

IMAGES, TOWER = "images", "qwen"
"""Names of the modality and of its encoder."""

_COMMON = {
    "num_layers": "depth",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_heads",
    "num_query_groups": "num_heads",
    "ffn_hidden_size": "intermediate_size",
}
_READ = frozenset(
    {*_COMMON.values(), "hidden_act", "in_channels", "patch_size", "spatial_merge_size"}
    | {"temporal_patch_size", "out_hidden_size", "rope_parameters"}
)
_WHOLE = frozenset({"text_config", "vision_config", "image_token_id", "tie_word_embeddings"})
_OF_VIDEOS = frozenset({"video_token_id", "vision_start_token_id", "vision_end_token_id"})
_OLDER, _NEWER = {}, {"visual.": "model.visual.", "model.": "model.language_model."}


def _settings(config: Any) -> dict[str, Any]:
    return {
        **renamed(config, _COMMON),
        "kv_channels": config.hidden_size // config.num_heads,
        "activation_func": activation(config.hidden_act),
        "layernorm_epsilon": 1e-6,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "add_bias_linear": True,
    }


def _shape(config: Any, **more: Any) -> QwenVisionShape:
    side = config.patch_size
    return QwenVisionShape(
        patch=(config.in_channels, config.temporal_patch_size, side, side),
        merge=config.spatial_merge_size,
        output_size=config.out_hidden_size,
        rotary_base=config.rope_parameters["rope_theta"],
        **more,
    )


def _windowed_settings(config: Any) -> dict[str, Any]:
    return {**_settings(config), "gated_linear_unit": True, "normalization": "RMSNorm"}


def _windowed_params(config: Any) -> dict[str, Any]:
    side = config.window_size // config.spatial_merge_size // config.patch_size
    full = tuple(config.fullatt_block_indexes)
    return {"shape": _shape(config, window=side, full_layers=full)}


def _stacked_settings(config: Any) -> dict[str, Any]:
    return {**_settings(config), "normalization": "LayerNorm"}


def _stacked_params(config: Any) -> dict[str, Any]:
    side = int(config.num_position_embeddings**0.5)
    levels = tuple(config.deepstack_visual_indexes)
    return {"shape": _shape(config, patch_bias=True, table_side=side, levels=levels)}


def _kinds(ours: str, theirs: str, weight: Cut, bias: Cut | None = None) -> list[Line]:
    """A layer's weight and, with a cut for it, its bias."""
    made = [line(f"{ours}weight", f"{theirs}.weight", weight)]
    return made + ([line(f"{ours}bias", f"{theirs}.bias", bias)] if bias else [])


def _layer(ours: str, theirs: str, bias: Cut | None) -> list[Line]:
    """Lines of a layer that both towers have.

    Args:
        ours: prefix of the layer.
        theirs: prefix of the layer.
        bias: cut of a norm's bias; None without one.
    """
    attention, lines = f"{ours}self_attention.", []
    # A norm has a name of its own, or that which Transformer Engine's layers give it.
    for name in ("input_layernorm.", "self_attention.linear_qkv.layer_norm_"):
        lines += _kinds(ours + name, f"{theirs}norm1", Whole(), bias)
    for name in ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"):
        lines += _kinds(ours + name, f"{theirs}norm2", Whole(), bias)
    lines += _kinds(f"{attention}linear_qkv.", f"{theirs}attn.qkv", FusedQKV(), FusedQKV())
    return lines + _kinds(f"{attention}linear_proj.", f"{theirs}attn.proj", Along(1), Whole())


def _gated_mlp(ours: str, theirs: str) -> list[Line]:
    both = ("gate_proj", "up_proj")
    return [
        *_kinds(f"{ours}mlp.linear_fc2.", f"{theirs}mlp.down_proj", Along(1), Whole()),
        *(
            line(f"{ours}mlp.linear_fc1.{kind}", [f"{theirs}mlp.{x}.{kind}" for x in both], Gated())
            for kind in ("weight", "bias")
        ),
    ]


def _two_layers(ours: str, theirs: str, names: Sequence[str]) -> list[Line]:
    """An MLP under two of their names."""
    first, second = names
    return [
        *_kinds(f"{ours}linear_fc1.", theirs + first, Along(0), Along(0)),
        *_kinds(f"{ours}linear_fc2.", theirs + second, Along(1), Whole()),
    ]


def _tower(config: Any, shape: QwenVisionShape, layer: Callable[[str, str], list[Line]]) -> Table:
    """Lines of all layers, whose runs follow from the configuration, and of the embedding."""
    bias = Whole() if shape.patch_bias else None
    lines = _kinds("patch_embedding.", "visual.patch_embed.proj", Whole(), bias)
    for number, run in enumerate(runs_of(config.depth, shape)):
        for own in range(run.size):
            theirs = f"visual.blocks.{run.start + own}."
            lines += layer(f"runs.{number}.layers.{own}.", theirs)
    return Table(tuple(lines), ("visual.rotary_pos_emb.inv_freq",))


def _windowed_table(config: Any) -> Table:
    def layer(ours: str, theirs: str) -> list[Line]:
        return _layer(ours, theirs, None) + _gated_mlp(ours, theirs)

    merger = [
        *_kinds("merger.norm.", "visual.merger.ln_q", Whole()),
        *_two_layers("merger.mlp.encoder.", "visual.merger.mlp.", "02"),
    ]
    table = _tower(config, _windowed_params(config)["shape"], layer) + Table(tuple(merger))
    return table.at(f"encoders.{TOWER}.")


def _stacked_table(config: Any) -> Table:
    names = ("linear_fc1", "linear_fc2")

    def layer(ours: str, theirs: str) -> list[Line]:
        return _layer(ours, theirs, Whole()) + _two_layers(f"{ours}mlp.", f"{theirs}mlp.", names)

    mergers = {"merger.": "visual.merger."}
    for level in range(len(config.deepstack_visual_indexes)):
        mergers[f"level_mergers.{level}."] = f"visual.deepstack_merger_list.{level}."
    more = [line("position_embedding.weight", "visual.pos_embed.weight", Whole())]
    for ours, theirs in mergers.items():
        more += _kinds(f"{ours}norm.", f"{theirs}norm", Whole(), Whole())
        more += _two_layers(f"{ours}mlp.encoder.", theirs, names)
    table = _tower(config, _stacked_params(config)["shape"], layer) + Table(tuple(more))
    return table.at(f"encoders.{TOWER}.")


def _whole_number(field: str) -> Callable[[Any], str | None]:
    def reason(config: Any) -> str | None:
        return None if isinstance(getattr(config, field), int) else "only one number is"

    return reason


_SIZES = {name: _whole_number(name) for name in ("patch_size", "temporal_patch_size")}


def _no_square(config: Any) -> str | None:
    side = int(config.num_position_embeddings**0.5)
    return None if side**2 == config.num_position_embeddings else "it is no square number"


WINDOWED = Family(
    model_types=("qwen2_5_vl_vision",),
    settings=_windowed_settings,
    params=_windowed_params,
    table=_windowed_table,
    reads=_READ | {"window_size", "fullatt_block_indexes"},
    ignores=frozenset({"tokens_per_second"}),  # of videos
    refuses=_SIZES,
)
STACKED = Family(
    model_types=("qwen3_vl_vision",),
    settings=_stacked_settings,
    params=_stacked_params,
    table=_stacked_table,
    reads=_READ | {"deepstack_visual_indexes"},
    refuses={**_SIZES, "num_position_embeddings": _no_square},
)


def _images_spec(
    shape: QwenVisionShape,
    config: TransformerConfig,
    groups: ProcessGroupCollection,
    language_hidden: int,
) -> ModuleSpec:
    if shape.output_size != language_hidden:
        raise UnsupportedModelError(
            f"the tower's out_hidden_size is {shape.output_size}, the language model's "
            f"hidden_size {language_hidden}; they must be equal"
        )
    tower = ModuleSpec(
        module=QwenVisionTower,
        params={"config": config, "pg_collection": groups, "shape": shape},
    )
    return ModuleSpec(
        module=VisionModalitySubmodules,
        params={"pg_collection": groups, "rows_per_item": {TOWER: shape.rows}},
        submodules={"encoders": {TOWER: tower}},
    )


def _text(config: Any, rope: Mapping[str, Any]) -> Any:
    """Configuration of the language model, with what the whole one says of it."""
    text = copy.copy(config.text_config)
    given = dict(text.rope_parameters or {})
    text.rope_parameters = {"mrope_section": rope["mrope_section"], **given, **rope["always"]}
    text.tie_word_embeddings = config.tie_word_embeddings
    return text


def _composite(config: Any, family: Family, rope: Mapping[str, Any]) -> Composite:
    check_fields(config, reads=_WHOLE, ignores=_OF_VIDEOS)
    vision, text = config.vision_config, _text(config, rope)
    family.check(vision)
    shape = family.params(vision)["shape"]
    images = EncoderPart(
        modality=IMAGES,
        name=TOWER,
        token_id=config.image_token_id,
        inputs=("pixel_values", "image_grid_thw"),
        spec=partial(_images_spec, shape),
        family=family,
        config=vision,
        spellings=(_OLDER, _NEWER),
        sequence_parallel=True,
        # Levels are added after the first layers, one each.
        level_layers=tuple(range(len(shape.levels))),
    )
    return Composite(LanguagePart(text, decoder_family(text), (_OLDER, _NEWER)), (images,))


def _qwen2_5_vl(config: Any) -> Composite:
    rope = {"mrope_section": [16, 24, 24], "always": {"mrope_interleaved": False}}
    return _composite(config, WINDOWED, rope)


def _qwen3_vl(config: Any) -> Composite:
    rope = {"mrope_section": [24, 20, 20], "always": {"mrope_interleaved": True}}
    return _composite(config, STACKED, rope)


COMPOSITES["qwen2_5_vl"] = _qwen2_5_vl
COMPOSITES["qwen3_vl"] = _qwen3_vl
