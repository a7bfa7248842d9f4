# SPDX-License-Identifier: Apache-2.0
"""Levels of a modality's rows that are added to the hidden states after layers of their own.

With ``L`` levels an encoder brings rows of width ``(1 + L) * H``: what stands among the text, then
level 1 to L. The rows ride over the bridges as they are; a pipeline stage gets the columns that it
needs. Level ``i`` is added to the output of layer ``deepstack_layers[name][i]`` at the places of
the modality's tokens, on the ranks that own them.

**How levels reach a layer.** As the layers' cross-attention ``context`` and ``context_mask``, which
stock hands through a block to every layer, unread where layers have no cross-attention, and adds
there in a forward hook. A layer that is recomputed in backward gets them again as tensors that were
saved for its microbatch, and their gradient as that of any input: what a hook kept of the forward
pass would by then belong to another microbatch, and its gradient would pass the checkpoint by.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from megatron.core.models.mimo.config.base_configs import MimoModelConfig, option_of
from megatron.core.models.mimo.config.role import ModuleLayout
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.utils import make_viewless_tensor, unwrap_model


@dataclass(frozen=True)
class DeepStack:
    """Which levels a model's rows have and which pipeline stage adds them. Integers.

    >>> levels = DeepStack(8, {"images": (0, 2)}, stage_of=(0, 0, 1, 1))
    >>> levels.row_width("images"), levels.row_width("sounds"), levels.later_stages("images")
    (24, 8, (1,))
    >>> levels.blocks("images", 0), levels.blocks("images", 1)
    ([0, 1], [2])

    Attributes:
        width: ``H`` of the language model.
        layers: modality -> the layer of each of its levels, from 0.
        stage_of: pipeline rank of every layer; empty where no modality has levels.
    """

    width: int
    layers: Mapping[str, tuple[int, ...]]
    stage_of: tuple[int, ...] = ()

    @classmethod
    def of(cls, options: MimoModelConfig) -> DeepStack:
        """Read it from a model's configuration; without levels it says nothing of layers."""
        layers = {name: tuple(each) for name, each in option_of(options, LEVELS).items()}
        config = options.language_model_spec.params["config"]
        stages = stage_of_layers(config) if layers else ()
        return cls(getattr(config, "hidden_size", 0), layers, stages)

    @property
    def all_layers(self) -> set[int]:
        """Every layer after which a level is added."""
        return {layer for layers in self.layers.values() for layer in layers}

    def row_width(self, name: str) -> int:
        """Width of a modality's rows."""
        return (1 + len(self.layers.get(name, ()))) * self.width

    def width_problem(self, name: str, rows: torch.Tensor) -> str | None:
        """Return why rows cannot be what their encoder was said to bring."""
        levels, found = self.layers.get(name, ()), rows.size(-1)
        if not self.width:  # What stands in for a model does not say how wide it is.
            return None
        if found == self.row_width(name) or (not levels and found % self.width):
            return None  # Where rows are no levels, those who place them say so.
        return (
            f"rows of {name} are {found} wide, but with {len(levels)} levels (deepstack_layers "
            f"{levels}) they must be (1 + {len(levels)}) * {self.width} = {self.row_width(name)}; "
            "give deepstack_layers one layer per level that the encoder brings"
        )

    def later_stages(self, name: str) -> tuple[int, ...]:
        """Pipeline stages after the first that need levels of a modality, ascending."""
        return tuple(sorted({self.stage_of[layer] for layer in self.layers.get(name, ())} - {0}))

    def blocks(self, name: str, stage: int) -> list[int]:
        """Which blocks of ``H`` columns a stage needs; block 0 is what stands among the text."""
        levels = self.layers.get(name, ())
        here = [1 + i for i, layer in enumerate(levels) if self.stage_of[layer] == stage]
        return [0, *here] if stage == 0 else here

    def columns(self, name: str, stage: int, rows: torch.Tensor) -> torch.Tensor:
        """Return the columns of whole rows that a stage needs: ``(n, blocks * H)``."""
        return self._picked(rows, self.blocks(name, stage)) if name in self.layers else rows

    def main(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Return what stands among the text, of rows that begin with it."""
        return rows[:, : self.width] if name in self.layers else rows

    def levels(
        self, name: str, rows: torch.Tensor, blocks: Sequence[int], layers: Iterable[int]
    ) -> torch.Tensor:
        """Return the levels for some layers, side by side: ``(n, layers * H)``.

        Args:
            name: of the modality.
            rows: ``(n, len(blocks) * H)``.
            blocks: that they have.
            layers: for which the modality may have a level or not, then zeros.
        """
        own = self.layers[name]
        at = [blocks.index(1 + own.index(each)) if each in own else -1 for each in layers]
        return self._picked(rows, at)

    def _picked(self, rows: torch.Tensor, blocks: list[int]) -> torch.Tensor:
        """Blocks of columns, of which -1 is zeros; neighbours are not copied."""
        width = self.width
        if blocks == list(range(blocks[0], blocks[0] + len(blocks))) and blocks[0] >= 0:
            return rows.narrow(1, blocks[0] * width, len(blocks) * width)
        parts = rows.split(width, dim=1)
        zeros = rows.new_zeros(rows.size(0), width)
        return torch.cat([parts[block] if block >= 0 else zeros for block in blocks], dim=1)


LEVELS = "deepstack_layers"


def stage_of_layers(config: Any) -> tuple[int, ...]:
    """Return the pipeline rank of every layer, in order, as stock deals them out."""
    stages = config.pipeline_model_parallel_size
    virtual = config.virtual_pipeline_model_parallel_size
    if stages == 1:
        return (0,) * config.num_layers
    found: list[int] = []
    for part in range(virtual or 1):
        for stage in range(stages):
            found += [stage] * _layers_of(config, part, stage)
    return tuple(found)


def _layers_of(config: Any, part: int, stage: int) -> int:
    layout = config.pipeline_model_parallel_layout
    if layout is not None:
        return layout.layout[stage][part].count(LayerType.decoder)
    virtual = config.virtual_pipeline_model_parallel_size
    return get_num_layers_to_build(config, None if virtual is None else part, stage)


@dataclass(frozen=True, eq=False)
class LevelRows:
    """Levels of one microbatch for a part of the language model.

    Attributes:
        rows: ``(n, layers * H)``, of the part's layers with levels, ascending.
        place: int64 ``(n,)``: where they go in the flattened ``(S_local * B)``, no place twice
            per modality; ``None``: everywhere, row by row.
    """

    rows: torch.Tensor
    place: torch.Tensor | None

    @classmethod
    def joined(cls, parts: Sequence[LevelRows]) -> LevelRows | None:
        """Several modalities' as one; ``None`` of none."""
        if len(parts) < 2:
            return parts[0] if parts else None
        everywhere = [each for each in parts if each.place is None]
        rows = [each.rows for each in parts if each.place is not None]
        places = [each.place for each in parts if each.place is not None]
        if not everywhere:
            return cls(torch.cat(rows), torch.cat(places))
        total = sum((each.rows for each in everywhere[1:]), everywhere[0].rows)
        for row, place in zip(rows, places, strict=True):
            total = total.index_add(0, place, row.to(total.dtype))
        return cls(total, None)

    def arguments(self) -> dict[str, Any]:
        """What a stage's forward is called with."""
        return {"extra_block_kwargs": {"context": self.rows, "context_mask": self.place}}


class LevelSeats:
    """The layers of a language model, or of one stage of it, after which levels are added.

    Args:
        stage: the part, bare or wrapped.
        layers: of the whole model after which any modality has a level.

    Attributes:
        layers: those that this part has, ascending.

    Raises:
        ValueError: the part has no numbered layers; layers that read ``context`` themselves.
    """

    def __init__(self, stage: nn.Module, layers: set[int]) -> None:
        found = {each.layer_number - 1: each for each in _layers(stage)}
        self.layers = tuple(sorted(layers & set(found)))
        self._added: list[int] = []
        for slot, number in enumerate(self.layers):
            _refuse_cross_attention(number, found[number])
            found[number].register_forward_hook(self._adder(slot), with_kwargs=True)

    def _adder(self, slot: int) -> Any:
        def add(_layer: nn.Module, _args: Any, given: Mapping[str, Any], output: Any) -> Any:
            levels = given.get("context")
            if levels is None:
                return None
            self._added.append(slot)
            hidden, *rest = output
            width = hidden.size(-1)
            level = levels.narrow(1, slot * width, width)
            return (_add(hidden, level, given.get("context_mask")), *rest)

        return add

    def begin(self) -> None:
        """A forward pass with levels begins."""
        self._added.clear()

    def check(self) -> None:
        """Refuse a forward pass that has left a level out.

        Raises:
            RuntimeError: the layers were not called as modules (captured graphs, say).
        """
        added = sorted(set(self._added))
        if added != list(range(len(self.layers))):
            done = [self.layers[slot] for slot in added]
            raise RuntimeError(
                f"levels are due after the layers {list(self.layers)}, but were added after "
                f"{done} only: the layers were not called as modules with their 'context'; turn "
                "off what runs them otherwise (CUDA graphs of layers)"
            )


def _add(hidden: torch.Tensor, level: torch.Tensor, place: torch.Tensor | None) -> torch.Tensor:
    """``(S_local, B, H)`` with rows added at their places."""
    level = level.to(hidden.dtype)
    if place is None:
        return hidden + level.view_as(hidden)
    flat = hidden.reshape(-1, hidden.size(-1)).index_add(0, place, level)
    # Stages free what they have sent, which stock refuses to do to a view.
    whole = flat.view_as(hidden)
    return make_viewless_tensor(whole, requires_grad=whole.requires_grad, keep_graph=True)


def _layers(stage: nn.Module) -> Iterable[Any]:
    layers = getattr(getattr(unwrap_model(stage), "decoder", None), "layers", None)
    if layers is None or any(not hasattr(each, "layer_number") for each in layers):
        raise ValueError(
            f"deepstack_layers needs a language model with decoder.layers that have a "
            f"layer_number, as GPTModel; {type(unwrap_model(stage)).__name__} has none"
        )
    return layers


def _refuse_cross_attention(number: int, layer: Any) -> None:
    if not isinstance(getattr(layer, "cross_attention", None), (IdentityOp, type(None))):
        raise ValueError(
            f"deepstack_layers names layer {number}, which has cross-attention: levels reach a "
            "layer as its context; name layers without it"
        )


def check_stage(levels: DeepStack, stage: int, seats: Iterable[LevelSeats]) -> None:
    """Refuse parts of the language model with other layers than their pipeline rank should have.

    Args:
        levels: of the model.
        stage: this rank's.
        seats: of all its parts.

    Raises:
        ValueError: a layer with a level is missing, or is another stage's.
    """
    due = sorted(layer for layer in levels.all_layers if levels.stage_of[layer] == stage)
    found = sorted(layer for each in seats for layer in each.layers)
    if due != found:
        raise ValueError(
            f"by its configuration pipeline stage {stage} has the layers {due} of those in "
            f"deepstack_layers, but it was built with {found}; build it with the layers that "
            "get_num_layers_to_build gives this stage"
        )


def check_levels_move(levels: DeepStack, mode: ModuleLayout, path: Any) -> None:
    """Refuse levels that nobody would bring to their layers.

    Args:
        levels: of the model.
        mode: where its modules are.
        path: the way of its rows.

    Raises:
        ValueError: modules on ranks of their own, or a kind of way without levels.
    """
    if not levels.layers:
        return
    if mode is not ModuleLayout.COLOCATED:
        raise ValueError(
            f"deepstack_layers is given for {sorted(levels.layers)}, but encoders and language "
            "model are on ranks of their own, and stock's bridge brings rows to the first stage's "
            "embedding only; put all modules on the same ranks"
        )
    if not hasattr(path, "levels"):
        raise ValueError(
            f"deepstack_layers is given for {sorted(levels.layers)}, but rows go by "
            f"{type(path).__name__}, which has no method levels; use bridge='routed' or 'gather'"
        )
