# SPDX-License-Identifier: Apache-2.0
"""A LLaVA or Qwen2-Audio model out of folders: a tower, a language model, a new projector.

built = from_folders(
    {"images": Layout(tp=2, dp=4), "language": Layout(tp=2, cp=2, dp=2)},
    images="clip-vit-large-patch14-336", language="Qwen2.5-7B", token_id=151655,
)
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron.core.models.mimo.huggingface.all_ranks import on_all_ranks
from megatron.core.models.mimo.huggingface.build import (
    BuildOptions,
    ImportedModel,
    import_from,
)
from megatron.core.models.mimo.huggingface.composites import Composite, describe
from megatron.core.models.mimo.huggingface.configuration import changed, read_config
from megatron.core.models.mimo.huggingface.families import qwen2_audio, whisper
from megatron.core.models.mimo.huggingface.families.llava import language_name, projector_shapes
from megatron.core.models.mimo.huggingface.families.vision_towers import TOWER, tower_kind
from megatron.core.models.mimo.huggingface.family import UnsupportedModelError
from megatron.core.models.mimo.huggingface.folder import FolderError, ModelFolder, OpenFolder
from megatron.core.models.mimo.huggingface.joined_folder import FolderPart, Folders
from mimo_colocated.launch.layouts import Layout

logger = logging.getLogger(__name__)

PROJECTOR = "input_projections."
"""Prefix of our names of what is drawn."""

_WHISPER = ("model.encoder.", "encoder.")
_EMBEDDING, _OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
_TOWER_PARTS = ("embeddings.", "pre_layrnorm.", "encoder.", "post_layernorm.", "head.")


def from_folders(
    layouts: Mapping[str, Layout],
    options: BuildOptions | None = None,
    *,
    language: str | Path,
    token_id: int,
    images: str | Path | None = None,
    audio: str | Path | None = None,
    load_weights: bool = True,
    tick: Callable[[int], None] = lambda _size: None,
) -> ImportedModel:
    """Build a model of a tower and a language model that have not met yet.

    The projector is drawn from the seed. With images the model is exported as a LLaVA folder: the
    tower's hidden state -2 is used, without the class token where there is one;
    ``options.config_fields`` may say otherwise, and what of ``LlavaConfig`` else they like. With
    audio it is a Qwen2-Audio folder: Whisper's encoder with pooled rows; the output layer, which
    that format has no tie for, begins as a copy of a tied embedding.

    Args:
        layouts: of ``"images"`` or ``"audio"``, and ``"language"``.
        options: how it is built.
        language: folder of a language model.
        token_id: stands for one row of an image or a sound in ``input_ids``; one of the
            vocabulary's that texts do not have.
        images: folder of a CLIP, SigLIP or SigLIP2 model, whole or its vision model alone.
        audio: folder of a Whisper, in place of ``images``.
        load_weights: False leaves weights as drawn, for a training checkpoint that is loaded next.
        tick: told the bytes of every parameter that was loaded.

    Raises:
        FolderError: a folder is no whole model.
        UnsupportedModelError: a kind of model or a setting that is not supported.
        ValueError: layouts that do not fit the model; a token that its vocabulary does not have;
            neither images nor audio, or both.
    """
    options, text = options or BuildOptions(), Path(language)
    if (images is None) == (audio is None):
        raise ValueError(
            f"images={images!r} and audio={audio!r}: the formats of LLaVA and Qwen2-Audio have one "
            "tower; give one of the two (more towers: from_folder with encoders=)"
        )
    kind, tower = (_IMAGES, Path(images)) if images is not None else (_AUDIO, Path(str(audio)))

    def read() -> tuple[Folders, Composite, OpenFolder]:
        parts = kind.parts(tower, text)
        config = kind.config(tower, text, token_id)
        config = changed(config, options.config_fields)
        folders = Folders(parts, config.to_dict(), kind.drawn(config))
        composite = _with_new_projector(describe(config))
        return folders, composite, replace(folders, drawn={}).open()

    folders, composite, found = on_all_ranks(read, f"open {tower} and {language}")
    with found as opened:
        built = import_from(
            opened, composite, layouts, options, load_weights=load_weights, tick=tick
        )
    built.source, built.config_fields = folders, {}
    if load_weights and dist.get_rank() == 0:
        logger.warning(
            "language is loaded from %s, the tower of %s from %s; their projector is new, "
            "drawn from seed %d",
            language, composite.encoders[0].modality, tower, options.seed,
        )  # fmt: skip
    return built


@dataclass(frozen=True)
class _Kind:
    """A format of whole models.

    Attributes:
        config: from the tower's folder, the language model's and the token to its configuration.
        parts: from the two folders to them with the names that tensors get.
        drawn: from the configuration to the projector's tensors and their shapes.
    """

    config: Callable[[Path, Path, int], Any]
    parts: Callable[[Path, Path], tuple[FolderPart, ...]]
    drawn: Callable[[Any], dict[str, tuple[int, ...]]]


def _text_config(language: Path, token_id: int) -> Any:
    text = read_config(language)
    if not 0 <= token_id < text.vocab_size:
        raise ValueError(
            f"token_id is {token_id}, but the vocabulary of {language} has {text.vocab_size} "
            "entries; choose one of them that texts do not have, or add a token to the folder "
            "first (resize_token_embeddings)"
        )
    return text


def _audio_config(audio: Path, language: Path, token_id: int) -> Any:
    from transformers import Qwen2AudioConfig, Qwen2AudioEncoderConfig

    text, sounds = _text_config(language, token_id), read_config(audio)
    if sounds.model_type != "whisper":
        raise UnsupportedModelError(
            f"{audio} is a {sounds.model_type}, not a Whisper; another tower runs as it is beside "
            "a language model (docs/bring-your-own-encoder.md)"
        )
    same = set(Qwen2AudioEncoderConfig().to_dict()) & (whisper.READ | set(whisper.REFUSED))
    return Qwen2AudioConfig(
        audio_config={
            "model_type": "qwen2_audio_encoder",
            **{name: getattr(sounds, name) for name in sorted(same)},
        },
        # The format's output layer is always its own.
        text_config={**text.to_dict(), "tie_word_embeddings": False},
        audio_token_index=token_id,
        architectures=["Qwen2AudioForConditionalGeneration"],
        dtype=text.dtype,
    )


def _audio_parts(audio: Path, language: Path) -> tuple[FolderPart, ...]:
    with ModelFolder(audio) as tower, ModelFolder(language) as text:
        prefix = next((p for p in _WHISPER if any(n.startswith(p) for n in tower.tensors)), None)
        if prefix is None:
            raise FolderError(f"{audio} has no tensors of Whisper's encoder; give a whole Whisper")
        of_tower = {
            name: qwen2_audio.TOWER + name.removeprefix(prefix)
            for name in tower.tensors
            if name.startswith(prefix)
        }
        of_text = {name: f"language_model.{name}" for name in text.tensors}
    parts = [FolderPart(language, of_text), FolderPart(audio, of_tower)]
    if _OUTPUT not in of_text:  # tied
        parts.append(FolderPart(language, {_EMBEDDING: f"language_model.{_OUTPUT}"}))
    return tuple(parts)


def _llava_config(images: Path, language: Path, token_id: int) -> Any:
    from transformers import LlavaConfig

    text, vision = _text_config(language, token_id), read_config(images)
    vision = getattr(vision, "vision_config", vision)
    kind = tower_kind(vision)
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


def _llava_parts(images: Path, language: Path) -> tuple[FolderPart, ...]:
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


_IMAGES = _Kind(_llava_config, _llava_parts, projector_shapes)
_AUDIO = _Kind(_audio_config, _audio_parts, qwen2_audio.projector_shapes)
