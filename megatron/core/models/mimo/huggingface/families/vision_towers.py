# SPDX-License-Identifier: Apache-2.0
"""Vision towers: CLIP, SigLIP and SigLIP2, up to the last hidden state that is used.

What is used is the whole model's to say, so a family is made for :class:`.Features`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron.core.models.mimo.huggingface.cuts import QKV, Along, Cut, Whole
from megatron.core.models.mimo.huggingface.family import (
    Family,
    UnsupportedModelError,
    activation,
    renamed,
)
from megatron.core.models.mimo.huggingface.tables import Line, Table, line
from megatron.core.models.mimo.towers.feature_transformer import Features
from megatron.core.models.mimo.towers.vision import (
    ImageShape,
    ImageTower,
    PatchTower,
    rows_per_image,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

TOWER = "vision_tower."
"""Prefix of a tower's names in its table, as in a LLaVA folder."""

_COMMON = {
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "ffn_hidden_size": "intermediate_size",
    "layernorm_epsilon": "layer_norm_eps",
    "attention_dropout": "attention_dropout",
}
_SIDES = ("image_size", "patch_size")
_READ = frozenset({*_COMMON.values(), *_SIDES, "hidden_act", "num_hidden_layers"})
_READ |= {"num_channels", "num_patches"}
# Of the text model, of the head that pools and of weights that are drawn.
_IGNORED = frozenset(
    ["initializer_factor", "projection_dim", "vision_use_head", "vocab_size", "logit_scale"]
)

# Names in a layer, ours -> (theirs, cut). Transformer Engine's layers hold norms in what follows.
_NORMS = {
    "layer_norm1": ("input_layernorm.", "self_attention.linear_qkv.layer_norm_"),
    "layer_norm2": ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"),
}
_LINEARS: dict[str, tuple[str, Cut, Cut]] = {
    "self_attention.linear_proj": ("self_attn.out_proj", Along(1), Whole()),
    "mlp.linear_fc1": ("mlp.fc1", Along(0), Along(0)),
    "mlp.linear_fc2": ("mlp.fc2", Along(1), Whole()),
}


@dataclass(frozen=True)
class TowerKind:
    """A kind of tower.

    Attributes:
        model_type: of its configuration.
        clip: with a class token and a norm before the layers, and no bias of patches.
        patches: its inputs are patches, else images.
        inputs: names of the processor's outputs that it takes.
    """

    model_type: str
    clip: bool = False
    patches: bool = False
    inputs: tuple[str, ...] = ("pixel_values",)

    def family(self, features: Features) -> Family:
        """Return the family of towers that return these features."""
        return Family(
            model_types=(self.model_type,),
            settings=functools.partial(_settings, features=features),
            params=functools.partial(_params, kind=self, features=features),
            table=functools.partial(_table, kind=self, features=features),
            reads=_READ,
            ignores=_IGNORED,
            refuses={name: functools.partial(_not_square, name) for name in _SIDES},
        )

    def spec(
        self, features: Features, config: Any
    ) -> Callable[[TransformerConfig, ProcessGroupCollection], ModuleSpec]:
        """Return a function that makes the tower's spec from its config and groups.

        Args:
            features: that it returns.
            config: transformers' configuration.
        """
        params = _params(config, kind=self, features=features)
        module = PatchTower if self.patches else ImageTower
        return lambda own, groups: ModuleSpec(
            module=module, params={"config": own, "pg_collection": groups, **params}
        )

    def rows(self, features: Features, config: Any) -> Callable[[Mapping[str, Any]], list[int]]:
        """Return a function that counts the rows of each whole image from the tower's inputs.

        Args:
            features, config: as of :meth:`spec`.
        """
        more = int(self.clip) - features.first_row
        return functools.partial(rows_per_image, patch=config.patch_size, more=more)


KINDS = {
    kind.model_type: kind
    for kind in (
        TowerKind("clip_vision_model", clip=True),
        TowerKind("siglip_vision_model"),
        TowerKind(
            "siglip2_vision_model",
            patches=True,
            inputs=("pixel_values", "pixel_attention_mask", "spatial_shapes"),
        ),
    )
}
"""``model_type`` -> kind of tower."""


def tower_kind(config: Any) -> TowerKind:
    """Return the kind of a tower by transformers' configuration.

    Raises:
        UnsupportedModelError: it is not known.
    """
    if config.model_type not in KINDS:
        raise UnsupportedModelError(
            f"a vision tower of model_type {config.model_type!r} is not known; known are "
            f"{', '.join(KINDS)}. docs/bring-your-own-encoder.md says how to use another one"
        )
    return KINDS[config.model_type]


def _not_square(name: str, config: Any) -> str | None:
    square = isinstance(getattr(config, name), int)
    return None if square else "images and patches must be squares, whose side is one number"


def _settings(config: Any, *, features: Features) -> dict[str, Any]:
    return {
        **renamed(config, _COMMON),
        "num_layers": features.layers,
        "activation_func": activation(config.hidden_act),
        "normalization": "LayerNorm",
        "hidden_dropout": 0.0,
        "add_bias_linear": True,
        "add_qkv_bias": True,
    }


def _params(config: Any, *, kind: TowerKind, features: Features) -> dict[str, Any]:
    if kind.patches:
        size = config.num_channels * config.patch_size**2
        return {"patch_size": size, "grid": int(config.num_patches**0.5), "features": features}
    shape = ImageShape(config.image_size, config.patch_size, config.num_channels)
    return {"shape": shape, "features": features, "clip": kind.clip}


def _table(config: Any, *, kind: TowerKind, features: Features) -> Table:
    embeddings = TOWER + "embeddings."
    lines = [
        line("position_embedding", embeddings + "position_embedding.weight", Whole()),
        line("patch_embedding.weight", embeddings + "patch_embedding.weight", Whole()),
        line("patch_embedding.bias", embeddings + "patch_embedding.bias", Whole()),
    ]
    if kind.clip:
        lines.append(line("class_embedding", embeddings + "class_embedding", Whole()))
        lines += _norm_lines("pre_norm.", TOWER + "pre_layrnorm.")
    blocks = features.blocks
    for number, (first, stop) in enumerate(blocks):
        layers = f"transformer.blocks.{number}.layers."
        if first == 0:
            lines += _layer_lines(layers + "{}.", TOWER + "encoder.layers.{}.")
            continue
        for layer in range(first, stop):
            lines += _layer_lines(f"{layers}{layer - first}.", f"{TOWER}encoder.layers.{layer}.")
    unused = [embeddings + "position_ids", TOWER + "head.*"]
    unused += [
        f"{TOWER}encoder.layers.{n}.*" for n in range(features.layers, config.num_hidden_layers)
    ]
    if features.final_norm:
        last = f"transformer.blocks.{len(blocks) - 1}.final_layernorm."
        lines += _norm_lines(last, TOWER + "post_layernorm.")
    else:
        unused.append(TOWER + "post_layernorm.*")
    return Table(tuple(lines), tuple(unused))


def _layer_lines(ours: str, theirs: str) -> list[Line]:
    lines = []
    for name, places in _NORMS.items():
        for place in places:
            lines += _norm_lines(ours + place, f"{theirs}{name}.")
    for name, (their_name, of_weight, of_bias) in _LINEARS.items():
        lines.append(line(f"{ours}{name}.weight", f"{theirs}{their_name}.weight", of_weight))
        lines.append(line(f"{ours}{name}.bias", f"{theirs}{their_name}.bias", of_bias))
    for kind in ("weight", "bias"):
        each = [f"{theirs}self_attn.{name}_proj.{kind}" for name in "qkv"]
        lines.append(line(f"{ours}self_attention.linear_qkv.{kind}", each, QKV()))
    return lines


def _norm_lines(ours: str, theirs: str) -> list[Line]:
    return [line(ours + kind, theirs + kind, Whole()) for kind in ("weight", "bias")]
