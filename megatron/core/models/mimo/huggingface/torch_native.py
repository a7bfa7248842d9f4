# SPDX-License-Identifier: Apache-2.0
"""Modules of transformers' own classes in a model from a folder: their specs and their names.

A torch-native module has the folder's own names under a prefix, and is whole until it is wrapped:
each of its weights is one tensor of the folder.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.models.mimo.huggingface.composites import (
    Composite,
    EncoderPart,
    LanguagePart,
)
from megatron.core.models.mimo.huggingface.cuts import Whole
from megatron.core.models.mimo.huggingface.family import UnsupportedModelError
from megatron.core.models.mimo.huggingface.tables import Line, Table, line
from megatron.core.models.mimo.job.built_model import LANGUAGE
from megatron.core.models.mimo.torch_native.language_model import TorchNativeLanguageModel
from megatron.core.models.mimo.torch_native.part import native_parts
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

_MODEL = "model."
"""Prefix of transformers' names in a :class:`.TorchNativeLanguageModel`."""


def with_native_parts(
    composite: Composite, names: Collection[str], recompute: str
) -> Composite:
    """Return the model with encoders that are built of transformers' own modules.

    Those that are not named lose their native form.

    Args:
        composite: the model.
        names: of the torch-native modules.
        recompute: of all modules.

    Raises:
        UnsupportedModelError: a module that the model lacks, or whose native form is not known;
            recomputation that transformers' modules do not have.
    """
    if isinstance(names, str):
        raise UnsupportedModelError(f"torch_native={names!r} is a name; give several: [{names!r}]")
    known = {LANGUAGE, *(part.modality for part in composite.encoders)}
    unknown = sorted(set(names) - known)
    if unknown:
        raise UnsupportedModelError(
            f"torch_native names {unknown}, but the model's modules are {sorted(known)}"
        )
    if names and recompute == "selective":
        raise UnsupportedModelError(
            f"recompute='selective' is of Megatron's layers, and torch_native names "
            f"{sorted(names)}, whose blocks are computed again whole or not at all; take 'full' or "
            "'none'"
        )
    for part in composite.encoders:
        if part.modality in names and part.native is None:
            raise UnsupportedModelError(
                f"torch_native names {part.modality!r}, and a {part.config.model_type} has no "
                "torch-native form here; leave it out, or bring the tower with "
                "own_encoders.tower_part"
            )
    encoders = tuple(
        part if part.modality in names else replace(part, native=None)
        for part in composite.encoders
    )
    return replace(composite, encoders=encoders)


def native_language_spec(
    source: Any, config: TransformerConfig, grid: HyperCommGrid, **settings: Any
) -> ModuleSpec:
    """Return the spec of a language model of transformers.

    Args:
        source: transformers' configuration.
        config: Megatron's.
        grid: the language model's.
        **settings: further arguments of :class:`.TorchNativeLanguageModel`.
    """
    params = {"config": config, "source": copy.deepcopy(source), "grid": grid, **settings}
    return ModuleSpec(module=TorchNativeLanguageModel, params=params)


def encoder_spec(
    part: EncoderPart,
    configs: Mapping[str, TransformerConfig],
    groups: ProcessGroupCollection,
    grid: HyperCommGrid,
) -> ModuleSpec:
    """Return the spec of a modality, torch-native if its part has such a form.

    Args:
        part: of the modality.
        configs: module -> Megatron's configuration.
        groups, grid: of the modality.
    """
    own, width = configs[part.modality], configs[LANGUAGE].hidden_size
    if part.native is not None:
        return part.native.spec(own, groups, width, grid=grid)
    return part.spec(own, groups, width)


def language_table(part: LanguagePart, modules: Sequence[nn.Module]) -> Table:
    """Return the table of a language model, of Megatron's layers or torch-native."""
    table = part.family.table(part.config)
    if any(map(native_parts, modules)):
        return replace(table, lines=tuple(_lines(modules, {_MODEL: ""})))
    return table


def encoder_table(part: EncoderPart, modules: Sequence[nn.Module]) -> Table:
    """Return the table of a modality, of Megatron's layers or torch-native."""
    table = part.family.table(part.config)
    if part.native is not None:
        return replace(table, lines=tuple(_lines(modules, part.native.names)))
    return table


def _lines(modules: Sequence[nn.Module], names: Mapping[str, str]) -> Iterator[Line]:
    for module in modules:
        for ours, _ in module.named_parameters():
            for prefix, theirs in names.items():
                if ours.startswith(prefix):
                    yield line(ours, theirs + ours.removeprefix(prefix), Whole())
