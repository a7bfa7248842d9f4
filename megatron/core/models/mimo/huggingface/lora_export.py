# SPDX-License-Identifier: Apache-2.0
"""Adapters in peft's file format, and for a while merged into the weights."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core.models.mimo.huggingface.all_ranks import on_all_ranks
from megatron.core.models.mimo.huggingface.build import ImportedModel
from megatron.core.models.mimo.huggingface.configuration import read_config
from megatron.core.models.mimo.huggingface.family import UnsupportedModelError
from megatron.core.models.mimo.huggingface.folder import FolderError
from megatron.core.models.mimo.huggingface.lora import Adapted, Piece, adapted_layers
from megatron.core.models.mimo.huggingface.tables import Table
from megatron.core.models.mimo.training.agreement import gathered
from megatron.core.models.mimo.transformer.lora import merge

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."

Described = tuple[str, str, int, str, bool]
"""(module, Megatron's layer, source, name in the folder, whether it is transposed there)."""


def to_adapter_folder(built: ImportedModel, folder: str | Path, *, overwrite: bool = False) -> None:
    """Write the adapters as peft reads them; every rank calls it together.

    ``peft.PeftModel.from_pretrained(model, folder)`` puts them on the model of transformers that
    ``built`` came from. Rank 0 gathers them: they are small beside the weights.

    Args:
        built: with adapters.
        folder: appears when it is whole; all ranks name it.
        overwrite: replace what is there.

    Raises:
        UnsupportedModelError: the model has no adapters.
        FolderError: the folder is taken or cannot be written; the same on all ranks.
    """
    if built.lora is None:
        raise UnsupportedModelError("the model has no adapters; build it with BuildOptions(lora=)")
    built.model.start_param_sync(force_sync=True)  # of the last step, still on their way
    whole = assembled(piece for each in built.adapted for k in "AB" for piece in each.pieces(k))
    found = everywhere(built.adapted)

    def write() -> None:
        if whole is not None:
            _write(built, whole, found, Path(folder), overwrite)

    on_all_ranks(write, f"write {folder}")


def assembled(pieces: Iterable[Piece]) -> dict[str, Tensor] | None:
    """Return whole matrices by name on rank 0, None on others; every rank calls it together."""
    told: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(list(pieces), told)
    if told is None:
        return None
    whole: dict[str, Tensor] = {}
    for own in told:
        for name, shape, place, value in own:
            whole.setdefault(name, torch.full(shape, torch.nan, dtype=value.dtype))[place] = value
    return whole


def everywhere(adapted: Sequence[Adapted]) -> list[Described]:
    """Return what all ranks' adapters are; every rank calls it together."""
    own = [(each.part, each.path, each.source, each.name, each.transposed) for each in adapted]
    return sorted({each for rank in gathered(own) for each in rank})


def _write(
    built: ImportedModel,
    whole: Mapping[str, Tensor],
    found: Sequence[Described],
    folder: Path,
    overwrite: bool,
) -> None:
    from safetensors.torch import save_file

    lora = built.lora
    assert lora is not None
    if folder.exists() and not overwrite:
        raise FolderError(f"{folder} exists; give another folder, or overwrite=True")
    holes = [name for name, value in whole.items() if value.isnan().any()]
    if holes:
        raise FolderError(f"{holes[0]} has elements that no rank has, or that are no numbers")
    paths = module_paths(built, found)
    kinds = {transposed for *_, transposed in found}
    if len(kinds) > 1:
        raise FolderError("peft has no file for layers stored as (in, out) among others")
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": str(built.source),
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": sorted(paths.values()),
        "fan_in_fan_out": kinds.pop(),
        "bias": "none",
        "inference_mode": True,
    }
    tensors = {
        f"{_PREFIX}{paths[name]}.lora_{key}.weight": whole[f"{name}.lora_{key}.weight"]
        for name in paths
        for key in "AB"
    }
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    old = folder.with_name(f".{folder.name}.old.{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        save_file({k: v.contiguous() for k, v in tensors.items()}, partial / WEIGHTS)
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        if folder.exists():
            folder.replace(old)
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def module_paths(built: ImportedModel, found: Sequence[Described]) -> dict[str, str]:
    """Return name of a layer in the folder -> its path in transformers' model, maybe another.

    Args:
        built: the model.
        found: of :func:`everywhere`.

    Raises:
        FolderError: transformers' model has no such layer.
    """
    import transformers

    config = read_config(Path(str(built.source)))
    kind = getattr(transformers, (config.architectures or ["AutoModelForCausalLM"])[0])
    with torch.device("meta"):
        model = kind(config) if hasattr(kind, "base_model_prefix") else kind.from_config(config)
    known = {name for name, _ in model.named_modules()}
    paths: dict[str, str] = {}
    language = built.composite.language
    parts = {each.modality: each for each in built.composite.encoders}
    for module in sorted({part for part, *_ in found}):
        own = parts.get(module, language)
        table = own.family.table(own.config)
        each = [
            _spelled(table.spelled(spelling), found, module)
            for spelling in ({}, *own.spellings)
        ]
        best = max(each, key=lambda spelled: len(known & set(spelled.values())))
        missing = sorted(set(best.values()) - known)
        if missing:
            raise FolderError(f"{type(model).__name__} of transformers has no layer {missing[0]}")
        paths |= best
    return paths


def _spelled(table: Table, found: Sequence[Described], module: str) -> dict[str, str]:
    spelled = {}
    for part, path, source, name, _ in found:
        line = table.find(f"{path}.weight") if part == module else None
        if line is not None:
            spelled[name] = line.names[source].removesuffix(".weight")
    return spelled


@contextmanager
def merged(built: ImportedModel) -> Iterator[None]:
    """Have adapters merged into the weights, inside: for an export of the whole model.

    Outside the weights are those from before, to the bit. They are kept beside meanwhile, those of
    layers with adapters.
    """
    built.model.start_param_sync(force_sync=True)
    layers = adapted_layers(built.parts)
    before = [layer.weight.detach().clone() for layer in layers]
    try:
        for layer in layers:
            merge(layer)
        yield
    finally:
        with torch.no_grad():
            for layer, weight in zip(layers, before, strict=True):
                layer.weight.copy_(weight)
