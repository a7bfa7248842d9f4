# SPDX-License-Identifier: Apache-2.0
"""LLaVA: a CLIP, SigLIP or SigLIP2 tower, an MLP of two layers, any language model."""

from __future__ import annotations

import copy
import functools
from typing import Any

from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.models.mimo import VisionModalitySubmodules
from megatron.core.models.mimo.huggingface.composites import (
    COMPOSITES,
    Composite,
    EncoderPart,
    LanguagePart,
    NativeForm,
    decoder_family,
)
from megatron.core.models.mimo.huggingface.cuts import Along, Whole
from megatron.core.models.mimo.huggingface.families.vision_towers import (
    TOWER,
    TowerKind,
    tower_kind,
)
from megatron.core.models.mimo.huggingface.family import (
    Family,
    UnsupportedModelError,
    activation,
    check_fields,
)
from megatron.core.models.mimo.huggingface.tables import Table, line
from megatron.core.models.mimo.job.settings import projector_spec
from megatron.core.models.mimo.towers.feature_transformer import Features
from megatron.core.models.mimo.towers.hugging_face import Rows
from megatron.core.models.mimo.towers.torch_native import TorchNativeEncoder
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

IMAGES, ENCODER = "images", "vision"
"""Names of the modality and of its encoder."""

_PROJECTOR = "multi_modal_projector."
_NATIVE_NAMES = {f"encoders.{ENCODER}.tower.": TOWER, "input_projections.0.": _PROJECTOR}
_READ = frozenset(
    ["image_token_index", "multimodal_projector_bias", "projector_hidden_act", "vision_config"]
    + ["vision_feature_layer", "vision_feature_select_strategy", "text_config"]
    + ["tie_word_embeddings"]
)

# As transformers 5 writes folders, as it names parameters, and as older versions wrote folders.
_TOWER_SPELLINGS = (
    {},
    {TOWER: TOWER + "vision_model."},
    {TOWER: "model." + TOWER, _PROJECTOR: "model." + _PROJECTOR},
)
_LANGUAGE = "language_model."
_LANGUAGE_SPELLINGS = (
    {
        "model.": _LANGUAGE + "model.",
        "transformer.": _LANGUAGE + "model.",
        "lm_head.": _LANGUAGE + "lm_head.",
    },
    {"model.": "model." + _LANGUAGE, "transformer.": "model." + _LANGUAGE},
    {"transformer.": _LANGUAGE + "transformer.", "lm_head.": _LANGUAGE + "lm_head."},
)


def _llava(config: Any) -> Composite:
    """Return what a LLaVA model is made of.

    Raises:
        UnsupportedModelError: a part is not known, or a setting is not supported.
    """
    check_fields(config, reads=_READ, ignores=frozenset(["image_seq_length"]))
    text, vision = copy.deepcopy(config.text_config), config.vision_config
    text.tie_word_embeddings = config.tie_word_embeddings
    kind, features = tower_kind(vision), _features(config)
    encoder = EncoderPart(
        modality=IMAGES,
        name=ENCODER,
        token_id=config.image_token_index,
        inputs=kind.inputs,
        spec=functools.partial(_spec, kind=kind, features=features, whole=config),
        family=_with_projector(kind.family(features)),
        config=vision,
        spellings=_TOWER_SPELLINGS,
        sequence_parallel=True,
        cuts_items=True,
        features=len(features.depths),
        native=NativeForm(
            functools.partial(_native_spec, features=features, whole=config), _NATIVE_NAMES
        ),
    )
    family = decoder_family(text)
    return Composite(LanguagePart(text, family, _LANGUAGE_SPELLINGS), (encoder,))


def _features(config: Any) -> Features:
    strategies = {"default": 1, "full": 0}
    strategy = config.vision_feature_select_strategy
    if strategy not in strategies:
        raise UnsupportedModelError(
            f"llava: vision_feature_select_strategy={strategy!r} is not supported; known are "
            f"{sorted(strategies)}"
        )
    try:
        layers = config.vision_config.num_hidden_layers
        return Features.of(config.vision_feature_layer, layers, strategies[strategy])
    except ValueError as error:
        raise UnsupportedModelError(f"llava: vision_feature_layer: {error}") from None


def _with_projector(tower: Family) -> Family:
    """The family whose table names tower and projector, under their names in the modality."""

    def table(config: Any) -> Table:
        return tower.table(config).at(f"encoders.{ENCODER}.") + _projector_table()

    return Family(
        model_types=tower.model_types,
        settings=tower.settings,
        params=tower.params,
        table=table,
        reads=tower.reads,
        ignores=tower.ignores,
        refuses=tower.refuses,
    )


def _projector_table() -> Table:
    ours = "input_projections.0.encoder."
    return Table(
        (
            line(ours + "linear_fc1.weight", _PROJECTOR + "linear_1.weight", Along(0)),
            line(ours + "linear_fc1.bias", _PROJECTOR + "linear_1.bias", Along(0)),
            line(ours + "linear_fc2.weight", _PROJECTOR + "linear_2.weight", Along(1)),
            line(ours + "linear_fc2.bias", _PROJECTOR + "linear_2.bias", Whole()),
        )
    )


def projector_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Return the projector's tensors in a folder, and their shapes, by ``LlavaConfig``."""
    hidden = config.text_config.hidden_size
    width = config.vision_config.hidden_size * len(_features(config).depths)
    shapes: dict[str, tuple[int, ...]] = {
        f"{_PROJECTOR}linear_1.weight": (hidden, width),
        f"{_PROJECTOR}linear_2.weight": (hidden, hidden),
    }
    if config.multimodal_projector_bias:
        shapes |= {f"{_PROJECTOR}linear_{n}.bias": (hidden,) for n in (1, 2)}
    return shapes


def language_name(name: str) -> str:
    """Return the name in a LLaVA folder of a tensor that a language model's folder has."""
    for prefix, whole in _LANGUAGE_SPELLINGS[0].items():
        if name.startswith(prefix):
            return whole + name.removeprefix(prefix)
    return name


def _spec(
    tower: TransformerConfig,
    groups: ProcessGroupCollection,
    language_hidden: int,
    *,
    kind: TowerKind,
    features: Features,
    whole: Any,
) -> ModuleSpec:
    projector = TransformerConfig(
        num_layers=1,
        hidden_size=language_hidden,
        ffn_hidden_size=language_hidden,
        num_attention_heads=tower.tensor_model_parallel_size,
        tensor_model_parallel_size=tower.tensor_model_parallel_size,
        activation_func=activation(whole.projector_hidden_act),
        add_bias_linear=whole.multimodal_projector_bias,
        params_dtype=tower.params_dtype,
        bf16=tower.bf16,
        fp16=tower.fp16,
        perform_initialization=False,
        bias_activation_fusion=False,
        gradient_accumulation_fusion=False,
    )
    width = tower.hidden_size * len(features.depths)
    return ModuleSpec(
        module=VisionModalitySubmodules,
        params={
            "pg_collection": groups,
            "rows_per_item": {ENCODER: kind.rows(features, whole.vision_config)},
        },
        submodules={
            "encoders": {ENCODER: kind.spec(features, whole.vision_config)(tower, groups)},
            "input_projections": [projector_spec(projector, width, groups.tp)],
        },
    )


def _native_spec(
    tower: TransformerConfig,
    groups: ProcessGroupCollection,
    language_hidden: int,
    *,
    grid: HyperCommGrid,
    features: Features,
    whole: Any,
) -> ModuleSpec:
    """The tower and the projector of transformers; the tower is split over TP."""
    rows = Rows(layers=features.depths, first=features.first_row)
    encoder = {
        "source": whole.vision_config,
        "rows": rows,
        "grid": grid,
        "dtype": tower.params_dtype,
        "sequence_parallel": tower.sequence_parallel,
        "gradient_checkpointing": tower.recompute_granularity == "full",
    }
    projector = {"config": whole, "dtype": tower.params_dtype}
    return ModuleSpec(
        module=VisionModalitySubmodules,
        params={"pg_collection": groups},
        submodules={
            "encoders": {ENCODER: ModuleSpec(module=TorchNativeEncoder, params=encoder)},
            "input_projections": [ModuleSpec(module=_native_projector(), params=projector)],
        },
    )


@functools.cache
def _native_projector() -> type:
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    class NativeProjector(LlavaMultiModalProjector):
        """Transformers' own in a dtype."""

        def __init__(self, config: Any, dtype: Any) -> None:
            super().__init__(config)
            self.to(dtype)

    return NativeProjector


COMPOSITES["llava"] = _llava
