# SPDX-License-Identifier: Apache-2.0
"""Encoders beside what a folder holds: any tower of transformers, and a projector that is drawn.

dino = tower_part("images", source="dinov2-base", token_id=151655, rows=Rows(first=1))
layouts = {"images": Layout(dp=8), "language": Layout(tp=2, dp=4)}
built = from_folder("Qwen3-0.6B", layouts, encoders=[dino])
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.models.mimo import VisionModalitySubmodules
from megatron.core.models.mimo.huggingface.build import ImportedModel
from megatron.core.models.mimo.huggingface.composites import EncoderPart, NativeForm
from megatron.core.models.mimo.huggingface.configuration import read_config
from megatron.core.models.mimo.huggingface.family import Family, UnsupportedModelError
from megatron.core.models.mimo.huggingface.fits import LayoutError
from megatron.core.models.mimo.huggingface.tables import Source, Table
from megatron.core.models.mimo.towers.hugging_face import HuggingFaceEncoder, Rows, read_tower
from megatron.core.models.mimo.towers.torch_native import TorchNativeEncoder
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

TOWER = "tower"
"""Name of the encoder among the modality's."""
ProjectorSpec = Callable[[int, int, torch.dtype], ModuleSpec]
"""From (width of rows, hidden size of the language model, dtype) to the spec of a projector."""


def linear(width: int, hidden: int, dtype: torch.dtype) -> ModuleSpec:
    """Return the spec of a linear layer."""
    sizes = {"in_features": width, "out_features": hidden, "dtype": dtype}
    return ModuleSpec(module=torch.nn.Linear, params=sizes)


def tower_part(
    modality: str,
    source: str | Path | Any,
    *,
    token_id: int,
    rows: Rows | None = None,
    width: int | None = None,
    projector: ProjectorSpec = linear,
    **encoder: Any,
) -> EncoderPart:
    """Describe a tower of transformers for :func:`.build.from_folder`.

    It runs at TP 1, or at any TP that divides its heads where ``BuildOptions.torch_native`` names
    the modality: PyTorch splits it then by the plan of its family. Its weights are those of its
    folder, or drawn for a configuration; the projector's are drawn.

    Args:
        modality: name of the new modality.
        source: the tower's folder or configuration.
        token_id: stands for one of its rows in ``input_ids``.
        rows: what of the tower's output are rows.
        width: of a row; None for the configuration's ``hidden_size``, once per hidden state.
        projector: makes the spec of what leads to the language model's width.
        **encoder: further arguments of :class:`.HuggingFaceEncoder`, split over TP of
            :class:`.TorchNativeEncoder`. Without ``gradient_checkpointing`` among them blocks are
            computed again where the model is built with ``recompute="full"``.
    """
    config, rows = _config_of(source), rows or Rows()
    given = {"source": source, "rows": rows, **encoder}
    width = width or config.hidden_size * max(len(rows.depths), 1)
    family = Family(
        model_types=(config.model_type,),
        settings=_settings,
        params=lambda _config: {},
        table=lambda _config: _OwnTable(()),
        reads=frozenset(config.to_dict()),  # transformers' own code reads them all
    )
    known = {"given": given, "projector": projector, "width": width}
    return EncoderPart(
        modality=modality,
        name=TOWER,
        token_id=token_id,
        inputs=(),
        spec=functools.partial(_spec, modality=modality, **known),
        native=NativeForm(functools.partial(_native_spec, **known), {}),
        family=family,
        config=config,
        sequence_parallel=True,  # where PyTorch splits it; at TP 1 there is nothing to cut
        drawn=("encoders.", "input_projections."),
    )


def without_own_encoders(built: ImportedModel) -> ImportedModel:
    """Return what the folder of a model knows, to be exported; towers are saved by themselves.

    Args:
        built: the model.
    """
    known = tuple(part for part in built.parts if not isinstance(part.table, _OwnTable))
    return dataclasses.replace(built, parts=known)


class _OwnTable(Table):
    """No name of it is in the folder of the whole model."""

    def find(self, name: str) -> Source | None:
        """Refuse to look a parameter up.

        Raises:
            UnsupportedModelError: always.
        """
        raise UnsupportedModelError(
            f"{name} is of an encoder that the model's folder knows nothing of, so it would be "
            "lost: save the tower with its save_pretrained and the projector's state_dict, then "
            "export without_own_encoders(built)"
        )

    def spelled(self, spelling: Mapping[str, str]) -> Table:
        """Return itself: there are no names to spell."""
        return self


def _config_of(source: Any) -> Any:
    if not isinstance(source, (str, Path)):
        return source
    return read_config(Path(source))


def _settings(_config: Any) -> dict[str, Any]:
    """What a ``TransformerConfig`` must have; no layer of Megatron's reads it."""
    return {"num_layers": 1, "hidden_size": 64, "num_attention_heads": 64}


def _spec(
    config: TransformerConfig,
    groups: ProcessGroupCollection,
    language_hidden: int,
    *,
    modality: str,
    given: Mapping[str, Any],
    projector: ProjectorSpec,
    width: int,
) -> ModuleSpec:
    """The modality: the tower and its projector, whole on every rank."""
    if groups.tp.size() > 1:
        raise LayoutError(
            f"{modality} tp={groups.tp.size()}: a tower of transformers is not cut over TP by "
            f"Megatron, and every TP rank would encode the same; give {modality} tp=1 and dp="
            f"{groups.tp.size() * groups.dp.size()}, or let PyTorch cut it: "
            f"BuildOptions(torch_native=[{modality!r}])"
        )
    dtype = config.params_dtype
    tower = ModuleSpec(module=HuggingFaceEncoder, params=_read(given, config))
    return _modality(tower, projector(width, language_hidden, dtype), groups)


def _native_spec(
    config: TransformerConfig,
    groups: ProcessGroupCollection,
    language_hidden: int,
    *,
    grid: HyperCommGrid,
    given: Mapping[str, Any],
    projector: ProjectorSpec,
    width: int,
) -> ModuleSpec:
    """The modality: the tower, cut over TP, and its projector, whole on every rank."""
    dtype = config.params_dtype
    more = {"grid": grid, "sequence_parallel": config.sequence_parallel}
    tower = ModuleSpec(module=TorchNativeEncoder, params={**more, **_read(given, config)})
    return _modality(tower, projector(width, language_hidden, dtype), groups)


def _read(given: Mapping[str, Any], config: TransformerConfig) -> dict[str, Any]:
    """An encoder's arguments with the tower, read here: a rank that cannot is heard by others.

    Raises:
        UnsupportedModelError: the tower cannot compute its blocks again, and is to.
    """
    dtype = config.params_dtype
    again = config.recompute_granularity == "full"
    own = {"gradient_checkpointing": again, **given, "dtype": dtype}
    read = own["source"] = read_tower(own["source"], own.pop("tower_class", None), dtype)
    tower = read.model.get_submodule(own.get("part", ""))
    can = getattr(tower, "supports_gradient_checkpointing", False)
    if own["gradient_checkpointing"] and not can:
        raise UnsupportedModelError(
            f"{type(tower).__name__} cannot compute its blocks again in backward, as "
            "gradient_checkpointing or recompute='full' asks; give tower_part "
            "gradient_checkpointing=False to keep its activations"
        )
    return own


def _modality(
    tower: ModuleSpec, projector: ModuleSpec, groups: ProcessGroupCollection
) -> ModuleSpec:
    return ModuleSpec(
        module=VisionModalitySubmodules,
        params={"pg_collection": groups},
        submodules={"encoders": {TOWER: tower}, "input_projections": [projector]},
    )
