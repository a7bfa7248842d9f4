# SPDX-License-Identifier: Apache-2.0
"""LoRA on a model from a Hugging Face folder: which layers, in transformers' names.

A Megatron layer that joins several of transformers', such as query, key and value, gets an adapter
for each of them that is named. So the model is the same function as transformers' with adapters of
peft, and an adapter has the matrices that peft's would have, cut over TP.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron.core.models.mimo.huggingface.all_ranks import gathered
from megatron.core.models.mimo.huggingface.cuts import QKV, Along, Gated, Heads, Run, Shard
from megatron.core.models.mimo.huggingface.family import UnsupportedModelError
from megatron.core.models.mimo.huggingface.tables import Source
from megatron.core.models.mimo.huggingface.weights import Part
from megatron.core.models.mimo.randomness import derive_seed
from megatron.core.models.mimo.training.global_names import global_modules, join
from megatron.core.models.mimo.training.initial_weights import seeded
from megatron.core.models.mimo.transformer.lora import (
    Adapter,
    adapt,
    adapters_of,
    can_adapt,
    merge,
    take_off,
)
from megatron.core.tensor_parallel import ColumnParallelLinear
from mimo_colocated.launch.lora import Lora

Piece = tuple[str, tuple[int, ...], tuple[slice, ...], Tensor]
"""(name, shape of the whole, place in it, elements) of what a rank has of a matrix."""


@dataclass(frozen=True)
class Adapted:
    """An adapter of this rank and the linear layer of transformers that it changes.

    Attributes:
        part: name of the module.
        path: global name of Megatron's layer in it.
        source: which of the layer's source tensors it changes.
        name: of transformers' layer, as the folder spells it.
        adapter: itself.
        runs: of the adapter's rows or, of a row-parallel layer, columns: where they are in the
            whole matrix.
        length: of the whole matrix along them.
        transposed: the folder has the weight as ``(in, out)``.
        first_copy: no rank before this one holds the same elements.
    """

    part: str
    path: str
    source: int
    name: str
    adapter: Adapter
    runs: tuple[Run, ...]
    length: int
    transposed: bool
    first_copy: bool

    @property
    def seed_name(self) -> str:
        """What its first values are drawn for, in any layout."""
        return join(self.part, f"{self.path}.{self.source}")

    def shape(self, key: str) -> tuple[int, int]:
        """Return the shape of the whole ``A`` or ``B``."""
        rows, columns = getattr(self.adapter, key).shape
        if key not in self.adapter.cuts:
            return rows, columns
        return (self.length, columns) if key == "B" else (rows, self.length)

    def _places(self, key: str) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
        """(place in the whole, place in this rank's part)."""
        if key not in self.adapter.cuts:
            yield (slice(None),), (slice(None),)
            return
        before = (slice(None),) * self.adapter.cuts[key]
        for run in self.runs:
            there, here = slice(run.start, run.start + run.size), slice(run.at, run.at + run.size)
            yield (*before, there), (*before, here)

    @torch.no_grad()
    def write(self, key: str, whole: Tensor) -> None:
        """Put this rank's part of a whole ``A`` or ``B`` into the adapter."""
        for there, here in self._places(key):
            getattr(self.adapter, key)[here] = whole[there].to(getattr(self.adapter, key).dtype)

    def pieces(self, key: str, of: Tensor | None = None) -> list[Piece]:
        """Return what this rank has of the whole ``A`` or ``B``, nothing of what another one has.

        Args:
            key: ``A`` or ``B``.
            of: a tensor of the parameter's shape instead, such as its gradient.
        """
        own = getattr(self.adapter, key).detach() if of is None else of
        copied = key not in self.adapter.cuts and self.adapter.group.rank() > 0
        if not self.first_copy or copied:
            return []
        name, shape = f"{self.name}.lora_{key}.weight", self.shape(key)
        return [(name, shape, there, own[here].cpu()) for there, here in self._places(key)]


def attach(parts: Sequence[Part], lora: Lora, seed: int) -> list[Adapted]:
    """Give the layers that are named adapters, and stop all else from training.

    All ranks call it together, with weights loaded and no module wrapped. ``A`` is drawn from the
    seed and the layer's name, as peft draws it, ``B`` is zero: the model stays the same function.

    Args:
        parts: the model's modules, in the folder's spelling.
        lora: which layers.
        seed: of the run.

    Returns:
        This rank's adapters.

    Raises:
        UnsupportedModelError: the same on all ranks: a target names no linear layer, or one that
            takes no adapters.
    """
    if problem := lora.problem():
        raise UnsupportedModelError(f"lora.{problem}")
    layers = [each for part in parts for each in _named(part, lora)]
    _check(parts, layers, lora)
    for part in parts:
        for module in part.modules:
            module.requires_grad_(False)
    found = []
    for part, path, layer, source, chosen in layers:
        own = [_adapter(part, path, layer, source, number, lora) for number in chosen]
        adapt(layer, {each.name.rpartition(".")[2]: each.adapter for each in own})
        for each in own:
            _draw(each, seed)
        found += own
    return found


_Layer = tuple[Part, str, Any, Source, list[int]]


def _named(part: Part, lora: Lora) -> Iterator[_Layer]:
    """This rank's layers of which a target names some source."""
    for module in part.modules:
        for path, layer in global_modules(module):
            if layer._parameters.get("weight") is None:
                continue
            source = part.table.find(join(path, "weight"))
            names = [_layer_name(name) for name in source.names] if source else []
            chosen = [
                number
                for number, name in enumerate(names)
                if any(lora.hits(target, name) for target in lora.targets)
            ]
            if source and chosen:
                yield part, path, layer, source, chosen


def _layer_name(tensor: str) -> str:
    return tensor.removesuffix(".weight")


def _check(parts: Sequence[Part], layers: Sequence[_Layer], lora: Lora) -> None:
    names = [_layer_name(source.names[n]) for _, _, _, source, chosen in layers for n in chosen]
    problem = None
    for _part, path, layer, source, chosen in layers:
        rows = isinstance(source.cut, (QKV, Along, Gated))
        if problem is None and not (can_adapt(layer) and rows):
            problem = (
                f"lora.targets names {_layer_name(source.names[chosen[0]])}, here {path}, a "
                f"{type(layer).__name__}; adapters are for column- and row-parallel linear layers "
                "of Megatron that are no expert's and not fused with a norm: take it out, or out "
                "of torch_native, or set MIMO_LAYERS=local"
            )
    used = [any(lora.hits(target, name) for name in names) for target in lora.targets]
    told = gathered((problem, used))
    for sentence, _ in told:
        if sentence:
            raise UnsupportedModelError(sentence)
    for number, target in enumerate(lora.targets):
        if not any(each[number] for _, each in told):
            known = sorted(set().union(*gathered(_last_parts(parts))))
            raise UnsupportedModelError(
                f"lora.targets: {target!r} names no linear layer of the model; it has "
                f"{', '.join(known)}"
            )


def _last_parts(parts: Sequence[Part]) -> set[str]:
    """What linear layers that take adapters are called, without their place."""
    found = set()
    for part in parts:
        for module in part.modules:
            for path, layer in global_modules(module):
                source = part.table.find(join(path, "weight"))
                if source and can_adapt(layer) and isinstance(source.cut, (QKV, Along, Gated)):
                    found |= {_layer_name(name).rpartition(".")[2] for name in source.names}
    return found


def _adapter(
    part: Part, path: str, layer: Any, source: Source, number: int, lora: Lora
) -> Adapted:
    group = layer.tp_group
    shard = Shard(group.rank(), group.size())
    joined = len(source.names) > 1
    column = isinstance(layer, ColumnParallelLinear)
    own = layer.weight.shape[0 if column else 1]
    lengths = _lengths(own * shard.size, source, part.heads)
    rows, runs, at = [], [], 0
    for run in source.cut.runs(lengths, shard, part.heads):
        if run.source == number:
            rows += range(run.at, run.at + run.size)
            runs.append(Run(number, run.start, at, run.size))
            at += run.size
    adapter = Adapter(layer, lora.rank, lora.scale, lora.dropout, rows if joined else None)
    copies = (part.groups.dp, part.groups.cp)
    first = all(copy is None or copy.rank() == 0 for copy in copies)
    return Adapted(
        part=part.name,
        path=path,
        source=number,
        name=_layer_name(source.names[number]),
        adapter=adapter,
        runs=tuple(runs),
        length=lengths[number],
        transposed=source.cut.transposed,
        first_copy=first,
    )


def _lengths(whole: int, source: Source, heads: Heads) -> list[int]:
    """Of the sources, along the dim that is cut."""
    count = len(source.names)
    if count == 3:  # query, key, value
        return [heads.query * heads.width, *[heads.groups * heads.width] * 2]
    return [whole // count] * count


def _draw(adapted: Adapted, seed: int) -> None:
    """Draw ``A`` as peft does: uniform, its bound the root of one over the inputs."""
    rows, columns = adapted.shape("A")
    whole = torch.empty(rows, columns, dtype=torch.float32, device=adapted.adapter.A.device)
    with seeded(whole.device, derive_seed(seed, adapted.seed_name)):
        torch.nn.init.uniform_(whole, -(columns**-0.5), columns**-0.5)
    adapted.write("A", whole)


def adapted_layers(parts: Sequence[Part]) -> list[Any]:
    """Return this rank's layers that have adapters."""
    modules = (module for part in parts for root in part.modules for module in root.modules())
    return [module for module in modules if adapters_of(module)]


def merge_into(parts: Sequence[Part]) -> None:
    """Merge adapters into the weights and take them off; for a model that nothing trains yet."""
    for layer in adapted_layers(parts):
        merge(layer)
        take_off(layer)
