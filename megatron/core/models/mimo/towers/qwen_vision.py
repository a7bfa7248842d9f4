# SPDX-License-Identifier: Apache-2.0
"""The vision towers of Qwen2.5-VL and Qwen3-VL, on Megatron's layers, so with its parallelism.

Images of different sizes go through in one call, their patches laid end to end. Patches see each
other within a frame or, in most layers of Qwen2.5-VL, within a window; both are packed sequences to
Megatron's attention, and for the windows patches stand in window order. Layers that follow each
other and attend alike are one ``TransformerBlock``, a *run*; a run also ends where Qwen3-VL takes a
level of its features (DeepStack), so that recomputed layers hand on whatever is taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from megatron.core.models.mimo.memory.layer_recompute import recomputable
from megatron.core.models.mimo.partition.packed_lengths import end_to_end
from megatron.core.models.mimo.towers.image_grids import (
    Grid,
    checked_grids,
    frame_lengths,
    interpolation,
    patch_places,
    patches_of,
    windows_of,
)
from megatron.core.models.mimo.towers.sharded_list import ShardedModuleList
from megatron.core.models.mimo.transformer.layer_specs import encoder_layer_spec
from megatron.core.models.mimo.uploads import upload
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig

_NORM_EPSILON = 1e-6


@dataclass(frozen=True)
class QwenVisionShape:
    """What tells these towers from each other, beside their ``TransformerConfig``.

    Attributes:
        patch: numbers of a patch: ``(channels, frames, height, width)``.
        merge: side in patches of the square that becomes one row.
        output_size: width of a row; of each level, too.
        rotary_base: of the angles of rows and columns.
        patch_bias: the patch embedding has a bias.
        window: side of the attention windows in merged squares; None without windows.
        full_layers: that attend to whole frames nonetheless.
        table_side: of the square table of learned positions; None without one.
        levels: layers, counted from 0, after which a level is taken, ascending.
    """

    patch: tuple[int, int, int, int]
    merge: int
    output_size: int
    rotary_base: float = 10_000.0
    patch_bias: bool = False
    window: int | None = None
    full_layers: tuple[int, ...] = ()
    table_side: int | None = None
    levels: tuple[int, ...] = ()

    def windowed(self, layer: int) -> bool:
        """Whether a layer attends within windows."""
        return self.window is not None and layer not in self.full_layers

    def rows(self, inputs: Mapping[str, Any]) -> list[int]:
        """Return the rows of each image, from the keyword arguments of the tower's forward."""
        return [
            patches // self.merge**2 for patches in patches_of(inputs["image_grid_thw"].tolist())
        ]


@dataclass(frozen=True)
class Run:
    """Layers that follow each other and attend alike.

    Attributes:
        start: the first one, counted from 0.
        size: how many.
        windowed: they attend within windows.
        level: whether a level is taken after them.
    """

    start: int
    size: int
    windowed: bool
    level: bool


def runs_of(layers: int, shape: QwenVisionShape) -> list[Run]:
    """Return the runs of a tower.

    Args:
        layers: of the tower.
        shape: of it.

    Raises:
        ValueError: a level that is no layer, or levels that do not ascend.
    """
    if list(shape.levels) != sorted({*shape.levels} & {*range(layers)}):
        raise ValueError(
            f"levels {list(shape.levels)} must be layers of the tower, 0 to {layers - 1}, in "
            "ascending order"
        )
    runs: list[Run] = []
    for layer in range(layers):
        windowed, level = shape.windowed(layer), layer in shape.levels
        if runs and runs[-1].windowed == windowed and not runs[-1].level:
            runs[-1] = replace(runs[-1], size=runs[-1].size + 1, level=level)
        else:
            runs.append(Run(layer, 1, windowed, level))
    return runs


class PatchMerger(MegatronModule):
    """Makes one row of each square of patches: a norm, and an MLP cut over TP.

    Args:
        config: of the tower.
        groups: of the modality's grid.
        shape: of the tower.
        norm_merged: the norm is over the whole square instead of each patch.
    """

    def __init__(
        self,
        config: TransformerConfig,
        groups: ProcessGroupCollection,
        shape: QwenVisionShape,
        norm_merged: bool = False,
    ) -> None:
        super().__init__(config=config)
        self.merged_size = config.hidden_size * shape.merge**2
        self.norm_merged = norm_merged
        norm = nn.RMSNorm if config.normalization == "RMSNorm" else nn.LayerNorm
        width = self.merged_size if norm_merged else config.hidden_size
        self.norm = norm(width, eps=_NORM_EPSILON, dtype=config.params_dtype)
        settings = replace(
            config,
            hidden_size=shape.output_size,
            ffn_hidden_size=self.merged_size,
            gated_linear_unit=False,
            activation_func=nn.functional.gelu,
            add_bias_linear=True,
            sequence_parallel=False,  # rows come whole
        )
        parts = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        self.mlp = MultimodalProjector(settings, parts, "mlp", self.merged_size, groups.tp)

    def forward(self, hidden: Tensor) -> Tensor:
        """Merge ``(patches, h)`` into ``(units, output_size)``."""
        if not self.norm_merged:
            hidden = self.norm(hidden)
        hidden = hidden.reshape(-1, self.merged_size)
        return self.mlp(self.norm(hidden) if self.norm_merged else hidden)


@dataclass(frozen=True)
class _Places:
    """What follows from the sizes of the images of a call.

    Attributes:
        order: of the units in which the layers see them; None as they come.
        angles: of each patch, ``(patches, 1, 1, head width)``, in that order.
        frames, windows: packed sequences.
    """

    order: Tensor | None
    angles: Tensor
    frames: PackedSeqParams
    windows: PackedSeqParams | None


class QwenVisionTower(MegatronModule):
    """Patches of images to merged rows.

    Args:
        config: of its layers; under sequence parallelism they cut patches over TP.
        pg_collection: of the modality's grid.
        shape: of the tower.

    Attributes:
        reads_on_host: inputs that are best left on the host; on a device they are waited for.

    Raises:
        ValueError: levels that are no layers.
    """

    reads_on_host = ("image_grid_thw",)

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        shape: QwenVisionShape,
    ) -> None:
        super().__init__(config=config)
        self.shape = shape
        self.pg_collection = pg_collection
        channels, frames, height, width = shape.patch
        kernel = (frames, height, width)
        # Patches come cut, so the convolution is a product; its weight keeps its five dims.
        width, dtype = config.hidden_size, config.params_dtype
        self.patch_embedding = nn.Conv3d(
            channels, width, kernel, kernel, bias=shape.patch_bias, dtype=dtype
        )
        if shape.table_side is not None:
            self.position_embedding = nn.Embedding(shape.table_side**2, width, dtype=dtype)
        self.plan = runs_of(config.num_layers, shape)
        blocks = [_block(config, run, pg_collection) for run in self.plan]
        self.runs = ShardedModuleList(blocks, pg_collection)
        self.merger = PatchMerger(config, pg_collection, shape)
        levels = [PatchMerger(config, pg_collection, shape, norm_merged=True) for _ in shape.levels]
        self.level_mergers = ShardedModuleList(levels, pg_collection)

    def forward(self, pixel_values: Tensor, image_grid_thw: Tensor) -> Tensor:
        """Encode images.

        Args:
            pixel_values: all patches, ``(patches, channels * frames * height * width)``, image by
                image in merge order, as the processor has them.
            image_grid_thw: frames, rows and columns of each image in patches, ``(images, 3)``.

        Returns:
            ``(units, (1 + levels) * output_size)``: of each merged square its row, then its
            levels.

        Raises:
            ValueError: patches of another size, or not those that the grids tell of.
        """
        expected = self.patch_embedding.weight[0].numel()
        if pixel_values.dim() != 2 or pixel_values.size(1) != expected:
            raise ValueError(
                f"pixel_values must be (patches, {expected}), got {tuple(pixel_values.shape)}; "
                "take them from the model's own processor"
            )
        grids = checked_grids(image_grid_thw, self.shape.merge, pixel_values.size(0))
        hidden = self._embed(pixel_values, grids)
        places = self._places(grids, hidden.device)
        hidden, levels = self._run(self._ordered(hidden, places.order), places)
        rows = torch.cat((self.merger(hidden), *levels), dim=-1)
        return rows if places.order is None else rows[places.order.argsort()]

    def _embed(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        weight = self.patch_embedding.weight
        hidden = nn.functional.linear(
            patches.to(weight.dtype), weight.flatten(1), self.patch_embedding.bias
        )
        if self.shape.table_side is None:
            return hidden
        indices, weights = interpolation(grids, self.shape.merge, self.shape.table_side)
        taps = self.position_embedding(upload(indices, hidden.device))
        return hidden + (taps * upload(weights, hidden.device)[..., None]).sum(1).to(hidden.dtype)

    def _run(self, hidden: Tensor, places: _Places) -> tuple[Tensor, list[Tensor]]:
        """The layers: hidden states after the last one, and the levels."""
        patches, levels = hidden.size(0), []
        hidden = self._cut(hidden)
        for run, block in zip(self.plan, self.runs, strict=True):
            hidden = block(
                hidden_states=recomputable(hidden, block),
                attention_mask=None,
                rotary_pos_emb=places.angles,
                packed_seq_params=places.windows if run.windowed else places.frames,
            )
            if run.level:
                levels.append(self.level_mergers[len(levels)](self._whole(hidden, patches)))
        return self._whole(hidden, patches), levels

    def _cut(self, hidden: Tensor) -> Tensor:
        """Patches ``(p, h)`` -> ``(p, 1, h)``, this rank's part of them under SP."""
        if not self.config.sequence_parallel:
            return hidden[:, None]
        whole = nn.functional.pad(hidden, (0, 0, 0, self._padding(hidden.size(0))))
        return scatter_to_sequence_parallel_region(whole[:, None], group=self.pg_collection.tp)

    def _whole(self, hidden: Tensor, patches: int) -> Tensor:
        """The reverse. Every TP rank goes on with all rows and gets the whole gradient of each."""
        if not self.config.sequence_parallel:
            return hidden[:, 0]
        whole = gather_from_sequence_parallel_region(
            hidden, tensor_parallel_output_grad=False, group=self.pg_collection.tp
        )
        return whole[:patches, 0]

    def _padding(self, patches: int) -> int:
        """Rows that are missing to equal parts under SP; a sequence of their own."""
        return -patches % self.pg_collection.tp.size() if self.config.sequence_parallel else 0

    def _places(self, grids: Sequence[Grid], device: torch.device) -> _Places:
        shape, order, windows = self.shape, None, None
        places, padding = patch_places(grids, shape.merge), self._padding(sum(patches_of(grids)))
        if shape.window is not None:
            found = windows_of(grids, shape.merge, shape.window)
            order, unit = found.order, shape.merge**2
            places = self._ordered(places, order)
            windows = self._packed([n * unit for n in found.lengths], padding, device)
            order = upload(order, device)
        half = self.config.hidden_size // self.config.num_attention_heads // 2
        steps = torch.arange(0, half, 2, dtype=torch.float32) / half
        places = nn.functional.pad(places, (0, 0, 0, padding))
        angles = places[..., None].float() * (1.0 / shape.rotary_base**steps)
        angles = upload(angles.flatten(1).repeat(1, 2)[:, None, None], device)
        frames = self._packed(frame_lengths(grids), padding, device)
        return _Places(order, angles, frames, windows)

    def _packed(
        self, lengths: Sequence[int], padding: int, device: torch.device
    ) -> PackedSeqParams:
        """Sequences laid end to end; their bounds stay on the host where no kernel reads them."""
        lengths = [*lengths, *([padding] if padding else [])]
        return end_to_end(lengths, device if self.config.apply_rope_fusion else None)

    def _ordered(self, patches: Tensor, order: Tensor | None) -> Tensor:
        """Rows of patches with their units in another order."""
        if order is None:
            return patches
        return patches.unflatten(0, (-1, self.shape.merge**2))[order].flatten(0, 1)


def _block(config: TransformerConfig, run: Run, groups: ProcessGroupCollection) -> TransformerBlock:
    own = replace(config, num_layers=run.size)
    return TransformerBlock(
        own, encoder_layer_spec(own), post_layer_norm=False, pg_collection=groups
    )
