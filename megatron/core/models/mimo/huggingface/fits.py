# SPDX-License-Identifier: Apache-2.0
"""Whether a model can be cut as a pair of layouts asks: pure integers, before anything is built."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from megatron.core.models.mimo.huggingface.composites import Composite, EncoderPart
from megatron.core.models.mimo.huggingface.family import UnsupportedModelError
from mimo_colocated.launch.layouts import LANGUAGE, Layout, Layouts, Limits, misfits, suggest

_ALONE = "encoder"


class LayoutError(ValueError):
    """Layouts that a model cannot be cut into; the message names the nearest that it can."""


def check_fits(
    composite: Composite,
    layouts: Mapping[str, Layout],
    *,
    sequence_parallel: bool,
    virtual_stages: int = 1,
    torch_native: Collection[str] = (),
) -> None:
    """Refuse layouts that do not fit the model.

    Args:
        composite: the model.
        layouts: module -> layout.
        sequence_parallel: the language model also cuts its sequence over TP.
        virtual_stages: stages per rank of the language model.
        torch_native: modules of transformers' own classes, which CP of an encoder does not cut.

    Raises:
        UnsupportedModelError: a modality's token is not in the vocabulary.
        LayoutError: modules without a layout, or the first misfit with its numbers and layouts
            that would fit.
    """
    modules = _modules(composite)
    if set(layouts) != set(modules):
        raise LayoutError(
            f"layouts are given for {sorted(layouts)}, but the model's modules are "
            f"{sorted(modules)}; give each of them one"
        )
    for name, layout in layouts.items():
        for what, count in _cut_evenly(modules[name]):
            if count % layout.tp:
                raise LayoutError(
                    f"{name} tp={layout.tp} does not divide its {what}; tp can be "
                    f"{[n for n in range(1, layout.tp) if count % n == 0]}"
                )
    _check_tokens(composite)
    language = modules[LANGUAGE]
    cut = [
        part.modality
        for part in composite.encoders
        if part.cuts_items and part.modality not in torch_native
    ]
    limits = Limits(
        global_batch_size=0,
        sequence_parallel=sequence_parallel,
        heads={name: _heads(settings) for name, settings in modules.items()},
        experts=language.get("num_moe_experts") or 0,
        language_layers=language["num_layers"],
        virtual_stages=virtual_stages,
        cut_items=cut,
    )
    encoders = {name: at for name, at in layouts.items() if name != LANGUAGE}
    # What a suggestion starts from; of a model without encoders it is not shown.
    alone = {_ALONE: Layout(dp=layouts[LANGUAGE].size)}
    pair = Layouts(encoders or alone, layouts[LANGUAGE])
    whole = [part for part in composite.encoders if part.modality not in cut]
    wrong = [*_uncut_items(whole, layouts, torch_native), *misfits(pair, limits)]
    if wrong:
        better, _ = suggest(pair, limits)
        shown = str(better) if encoders else f"--{LANGUAGE} {better.language}"
        raise LayoutError(f"{wrong[0]}; try {shown}")


def _uncut_items(
    whole: Collection[EncoderPart], layouts: Mapping[str, Layout], torch_native: Collection[str]
) -> Iterator[str]:
    """What of encoders that take whole items is to be cut over CP."""
    for part in whole:
        name, cp = part.modality, layouts[part.modality].cp
        kind = "torch-native encoder" if name in torch_native else part.config.model_type
        if cp > 1:
            yield (
                f"{name} cp={cp}: a {kind} takes whole items and is not cut over CP; give those "
                "ranks to its tp or dp"
            )


def _check_tokens(composite: Composite) -> None:
    vocabulary = composite.language.config.vocab_size
    for part in composite.encoders:
        if not 0 <= part.token_id < vocabulary:
            raise UnsupportedModelError(
                f"the token that stands for {part.modality}, {part.token_id}, is not one of the "
                f"vocabulary's {vocabulary}; enlarge the embedding with transformers' "
                "resize_token_embeddings first"
            )


def _modules(composite: Composite) -> dict[str, dict[str, Any]]:
    """Module -> fields of its TransformerConfig."""
    language = composite.language
    return {
        LANGUAGE: language.family.settings(language.config),
        **{part.modality: part.family.settings(part.config) for part in composite.encoders},
    }


def _heads(settings: Mapping[str, Any]) -> int:
    """Key/value heads, of which a rank has whole ones."""
    return settings.get("num_query_groups") or settings.get("num_attention_heads") or 0


def _cut_evenly(settings: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """What TP ranks have equal parts of, in words, and how much of it there is."""
    for words, name in (
        ("MLP width of {}", "ffn_hidden_size"),
        ("experts' width of {}", "moe_ffn_hidden_size"),
        ("{} key/value heads", "num_query_groups"),
    ):
        if settings.get(name):
            yield words.format(settings[name]), settings[name]
