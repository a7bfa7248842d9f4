# SPDX-License-Identifier: Apache-2.0
"""What a whole model is made of: its language model, its encoders, their places in a folder."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron.core.models.mimo.huggingface import families
from megatron.core.models.mimo.huggingface.families.decoders import DECODERS
from megatron.core.models.mimo.huggingface.family import Family, UnsupportedModelError
from megatron.core.models.mimo.huggingface.tables import Table
from megatron.core.transformer.spec_utils import ModuleSpec

Spelling = Mapping[str, str]
"""Prefix of names in a family's table -> prefix of a folder's names."""


@dataclass(frozen=True)
class LanguagePart:
    """The language model of a whole one.

    Attributes:
        config: transformers' configuration of it.
        family: that reads it.
        spellings: that folders have of its names; the first is the usual one.
    """

    config: Any
    family: Family
    spellings: tuple[Spelling, ...] = ({},)


@dataclass(frozen=True)
class NativeForm:
    """An encoder as transformers has it, sharded by PyTorch.

    Attributes:
        spec: as of :class:`EncoderPart`, from the grid as a further argument ``grid``.
        names: prefix of names in the ``ModalitySubmodules`` -> prefix in the folder of the whole
            model. What has none of them is drawn.
    """

    spec: Callable[..., ModuleSpec]
    names: Spelling


@dataclass(frozen=True)
class EncoderPart:
    """A modality's encoder and projector in a whole model.

    Attributes:
        modality: its name in the model, such as ``"images"``.
        name: of the encoder among the modality's.
        token_id: that stands for one row in ``input_ids``.
        inputs: names of the processor's outputs that the encoder takes.
        spec: from (its ``TransformerConfig``, its process groups, hidden size of the language
            model) to the spec of its ``ModalitySubmodules``.
        family: reads its configuration; its table names what the spec builds.
        config: transformers' configuration of it.
        spellings: that folders have of its names.
        sequence_parallel: its tower can cut its sequence over TP.
        cuts_items: its tower can cut each item's sequence over CP; its spec then counts rows.
        drawn: prefixes of our names of parameters that no folder has yet.
        level_layers: layers of the language model, counted from 0, after which the levels in its
            rows are added (DeepStack); none for plain rows.
        features: hidden states that lie side by side in what the projector reads.
        native: the same of transformers' own modules; None where that is not known.
    """

    modality: str
    name: str
    token_id: int
    inputs: tuple[str, ...]
    spec: Callable[..., ModuleSpec]
    family: Family
    config: Any
    spellings: tuple[Spelling, ...] = ({},)
    sequence_parallel: bool = False
    cuts_items: bool = False
    drawn: tuple[str, ...] = ()
    level_layers: tuple[int, ...] = ()
    features: int = 1
    native: NativeForm | None = None


@dataclass(frozen=True)
class Composite:
    """A whole model."""

    language: LanguagePart
    encoders: tuple[EncoderPart, ...] = ()
    unused: Table = Table(())


COMPOSITES: dict[str, Callable[[Any], Composite]] = {}
"""``model_type`` of whole models -> what one is made of, from its configuration.

Files of ``families/`` put theirs in; :func:`describe` imports them all.
"""


def describe(config: Any) -> Composite:
    """Return what a model is made of.

    Args:
        config: transformers' configuration.

    Raises:
        UnsupportedModelError: its kind is not known, or a setting is not supported.
    """
    _import_families()
    if config.model_type in COMPOSITES:
        return COMPOSITES[config.model_type](config)
    # A model without its output layer, and GPT-2 on the hub, leave out the first part of names.
    spellings: tuple[Spelling, ...] = ({}, {"model.": ""}, {"transformer.": ""})
    return Composite(LanguagePart(config, decoder_family(config), spellings))


@functools.cache
def _import_families() -> None:
    for each in pkgutil.iter_modules(families.__path__, families.__name__ + "."):
        importlib.import_module(each.name)


def decoder_family(config: Any) -> Family:
    """Return the family of a language model.

    Raises:
        UnsupportedModelError: there is none.
    """
    for family in DECODERS:
        if config.model_type in family.model_types:
            return family
    known = sorted({name for family in DECODERS for name in family.model_types} | set(COMPOSITES))
    raise UnsupportedModelError(
        f"model_type {config.model_type!r} is not known; known are {', '.join(known)}. "
        "docs/models.md says how to add a family"
    )
