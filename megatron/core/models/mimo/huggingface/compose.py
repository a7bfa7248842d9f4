# SPDX-License-Identifier: Apache-2.0
"""A LLaVA model out of folders of its parts: a vision tower, a language model, a new projector.

built = from_folders(
    {"images": Layout(tp=2, dp=4), "language": Layout(tp=2, cp=2, dp=2)},
    images="clip-vit-large-patch14-336", language="Qwen2.5-7B", token_id=151655,
)
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron.core.models.mimo.huggingface.build import (
    BuildOptions,
    ImportedModel,
    changed,
    import_from,
    read_config,
)
from megatron.core.models.mimo.huggingface.composites import Composite, describe
from megatron.core.models.mimo.huggingface.families.llava import language_name, projector_shapes
from megatron.core.models.mimo.huggingface.families.vision_towers import TOWER, tower_kind
from megatron.core.models.mimo.huggingface.folder import FolderError, ModelFolder
from megatron.core.models.mimo.huggingface.joined_folder import FolderPart, Folders
from mimo_colocated.launch.layouts import Layout

logger = logging.getLogger(__name__)

PROJECTOR = "input_projections."
"""Prefix of our names of what is drawn."""

_TOWER_PARTS = ("embeddings.", "pre_layrnorm.", "encoder.", "post_layernorm.", "head.")


def from_folders(
    layouts: Mapping[str, Layout],
    options: BuildOptions | None = None,
    *,
    images: str | Path,
    language: str | Path,
    token_id: int,
    load_weights: bool = True,
    tick: Callable[[int], None] = lambda _size: None,
) -> ImportedModel:
    """Build a LLaVA model of a tower and a language model that have not met yet.

    The projector is drawn from the seed. The model is exported as a LLaVA folder. The tower's
    hidden state -2 is used, without the class token where there is one; ``options.config_fields``
    may say otherwise, and what of ``LlavaConfig`` else they like.

    Args:
        layouts: of ``"images"`` and ``"language"``.
        options: how it is built.
        images: folder of a CLIP, SigLIP or SigLIP2 model, whole or its vision model alone.
        language: folder of a language model.
        token_id: stands for one row of an image in ``input_ids``; one of the vocabulary's that
            texts do not have.
        load_weights: False leaves weights as drawn, for a training checkpoint that is loaded next.
        tick: told the bytes of every parameter that was loaded.

    Raises:
        FolderError: a folder is no whole model.
        UnsupportedModelError: a kind of model or a setting that is not supported.
        ValueError: layouts that do not fit the model; a token that its vocabulary does not have.
    """
    options = options or BuildOptions()
    parts = _parts(Path(images), Path(language))
    config = _llava_config(Path(images), Path(language), token_id)
    config = changed(config, options.config_fields)
    composite = _with_new_projector(describe(config))
    folders = Folders(parts, config.to_dict(), projector_shapes(config))
    with replace(folders, drawn={}).open() as opened:
        built = import_from(
            opened, composite, layouts, options, load_weights=load_weights, tick=tick
        )
    built.source, built.config_fields = folders, {}
    if load_weights and dist.get_rank() == 0:
        logger.warning(
            "language is loaded from %s, the tower of images from %s; their projector is new, "
            "drawn from seed %d",
            language, images, options.seed,
        )  # fmt: skip
    return built


def _llava_config(images: Path, language: Path, token_id: int) -> Any:
    from transformers import LlavaConfig

    text, vision = read_config(language), read_config(images)
    vision = getattr(vision, "vision_config", vision)
    kind = tower_kind(vision)
    if not 0 <= token_id < text.vocab_size:
        raise ValueError(
            f"token_id is {token_id}, but the vocabulary of {language} has {text.vocab_size} "
            "entries; choose one of them that texts do not have, or add a token to the folder "
            "first (resize_token_embeddings)"
        )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=token_id,
        image_seq_length=_rows_per_image(vision),
        vision_feature_select_strategy="default" if kind.clip else "full",
        tie_word_embeddings=text.tie_word_embeddings,
        architectures=["LlavaForConditionalGeneration"],
        dtype=text.dtype,
    )


def _rows_per_image(vision: Any) -> int:
    if hasattr(vision, "num_patches"):
        return vision.num_patches
    return (vision.image_size // vision.patch_size) ** 2


def _with_new_projector(composite: Composite) -> Composite:
    (encoder,) = composite.encoders
    return replace(composite, encoders=(replace(encoder, drawn=(PROJECTOR,)),))


def _parts(images: Path, language: Path) -> tuple[FolderPart, ...]:
    with ModelFolder(images) as tower, ModelFolder(language) as text:
        of_tower = {name: TOWER + own for name, own in _tower_names(tower.tensors).items()}
        of_text = {name: language_name(name) for name in text.tensors}
    if not of_tower:
        raise FolderError(
            f"{images} has no tensors of a vision model; give a folder of CLIP, SigLIP or SigLIP2"
        )
    return FolderPart(language, of_text), FolderPart(images, of_tower)


def _tower_names(names: Iterable[str]) -> dict[str, str]:
    """Name in a folder of a whole model or of its vision model -> name in the vision model."""
    prefixed = {
        name: name.removeprefix("vision_model.")
        for name in names
        if name.startswith("vision_model.")
    }
    own = prefixed or {name: name for name in names}
    buffers = "embeddings.position_ids"
    return {n: short for n, short in own.items() if short.startswith(_TOWER_PARTS)
            and short != buffers}  # fmt: skip
