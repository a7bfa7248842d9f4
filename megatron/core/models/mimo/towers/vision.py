# SPDX-License-Identifier: Apache-2.0
"""The vision models of CLIP, SigLIP (images of one size per call) and SigLIP2 (patches)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron.core.models.mimo.towers.feature_transformer import Features, FeatureTransformer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig


@dataclass(frozen=True)
class ImageShape:
    """The images that a tower was made for.

    Attributes:
        side: of an image, in pixels.
        patch: side of a patch, in pixels.
        channels: of a pixel.
    """

    side: int
    patch: int
    channels: int = 3

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.side // self.patch


class ImageTower(MegatronModule):
    """CLIP's or SigLIP's vision model: images -> ``(n, rows, F * h)``.

    Args:
        config: of the layers; as many as the features need.
        pg_collection: of the modality's grid.
        shape: of the images.
        features: which hidden states, and whether the class token is left out.
        clip: with a class token and a norm before the layers; without, with a bias of patches.
    """

    cuts_items = True

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        shape: ImageShape,
        features: Features,
        *,
        clip: bool,
    ) -> None:
        super().__init__(config=config)
        self.shape, self.features = shape, features
        width, dtype = config.hidden_size, config.params_dtype
        self.patch_embedding = nn.Conv2d(
            shape.channels, width, shape.patch, stride=shape.patch, bias=not clip, dtype=dtype
        )
        self.class_embedding = nn.Parameter(torch.zeros(width, dtype=dtype)) if clip else None
        positions = shape.grid**2 + int(clip)
        self.position_embedding = nn.Parameter(torch.zeros(positions, width, dtype=dtype))
        # Over whole sequences on every TP rank, so its gradient is whole: not Megatron's norm.
        eps = config.layernorm_epsilon
        self.pre_norm = nn.LayerNorm(width, eps=eps, dtype=dtype) if clip else None
        self.transformer = FeatureTransformer(config, pg_collection, features)

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """Encode images.

        Args:
            pixel_values: ``(n, channels, height, width)``.
            interpolate_pos_encoding: take images of another size than the tower was made for;
                positions are interpolated, as transformers does.

        Raises:
            ValueError: images of another size, without ``interpolate_pos_encoding``, or of less
                than one patch.
        """
        self._check(pixel_values, interpolate_pos_encoding)
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        hidden = patches.flatten(2).transpose(1, 2)
        if self.class_embedding is not None:
            hidden = torch.cat([self.class_embedding.expand(len(hidden), 1, -1), hidden], dim=1)
        hidden = hidden + self._positions(*patches.shape[-2:])
        if self.pre_norm is not None:
            hidden = self.pre_norm(hidden)
        return self.transformer(hidden)

    def _check(self, pixel_values: Tensor, interpolate: bool) -> None:
        expected = (self.shape.channels, self.shape.side, self.shape.side)
        given = tuple(pixel_values.shape[1:])
        if pixel_values.ndim != 4 or given[0] != expected[0]:
            raise ValueError(
                f"pixel_values must be (images, {expected[0]}, height, width), got "
                f"{tuple(pixel_values.shape)}"
            )
        if min(given[1:]) < self.shape.patch or not (interpolate or given == expected):
            raise ValueError(
                f"images have {given[1]} x {given[2]} pixels, the tower was made for "
                f"{expected[1]} x {expected[2]}; let the processor resize them, or pass "
                f"interpolate_pos_encoding=True for sizes from {self.shape.patch} pixels"
            )

    def _positions(self, height: int, width: int) -> Tensor:
        """Positions ``(rows, h)`` of a grid of patches, the class token's first."""
        grid = self.shape.grid
        if (height, width) == (grid, grid):
            return self.position_embedding
        first = len(self.position_embedding) - grid**2
        of_patches = self.position_embedding[first:].unflatten(0, (grid, grid))
        resized = nn.functional.interpolate(
            of_patches.permute(2, 0, 1)[None],
            size=(height, width),
            mode="bicubic",
            align_corners=False,
        )
        return torch.cat([self.position_embedding[:first], resized[0].flatten(1).t()])


class PatchTower(MegatronModule):
    """SigLIP2's vision model: images of any shape, as patches -> rows of real patches ``(t, F*h)``.

    Args:
        config: of the layers; as many as the features need.
        pg_collection: of the modality's grid.
        patch_size: numbers in a patch.
        grid: side of the square of positions that are resized for each image.
        features: which hidden states; ``first_row`` counts within each image.

    Attributes:
        reads_on_host: inputs that are best left on the host; on a device they are waited for.
    """

    cuts_items = True
    reads_on_host = ("pixel_attention_mask", "spatial_shapes")

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        patch_size: int,
        grid: int,
        features: Features,
    ) -> None:
        super().__init__(config=config)
        self.grid, self.features = grid, features
        width, dtype = config.hidden_size, config.params_dtype
        self.patch_embedding = nn.Linear(patch_size, width, dtype=dtype)
        self.position_embedding = nn.Parameter(torch.zeros(grid**2, width, dtype=dtype))
        self.transformer = FeatureTransformer(config, pg_collection, features)

    def forward(
        self, pixel_values: Tensor, pixel_attention_mask: Tensor, spatial_shapes: Tensor
    ) -> Tensor:
        """Encode images; patches of padding have no rows.

        Args:
            pixel_values: ``(n, patches, patch_size)``, each image's real patches first.
            pixel_attention_mask: ``(n, patches)``, not zero at real patches.
            spatial_shapes: ``(n, 2)``, rows and columns of each image's patches.

        Raises:
            ValueError: mask and shapes do not agree, or shapes exceed the patches.
        """
        shapes = [(int(height), int(width)) for height, width in spatial_shapes.tolist()]
        lengths = self._lengths(pixel_values, pixel_attention_mask, shapes)
        patches = [image[:length] for image, length in zip(pixel_values, lengths, strict=True)]
        hidden = self.patch_embedding(torch.cat(patches).to(self.patch_embedding.weight.dtype))
        hidden = hidden + torch.cat([self._positions(*shape) for shape in shapes])
        return self.transformer(hidden, lengths)

    @staticmethod
    def _lengths(
        pixel_values: Tensor, mask: Tensor, shapes: Sequence[tuple[int, int]]
    ) -> list[int]:
        lengths = [height * width for height, width in shapes]
        real = mask.ne(0)
        there = torch.arange(real.shape[-1], device=mask.device) < real.sum(-1, keepdim=True)
        if pixel_values.ndim != 3 or mask.shape != pixel_values.shape[:2]:
            raise ValueError(
                "pixel_values must be (images, patches, numbers) and pixel_attention_mask "
                f"(images, patches), got {tuple(pixel_values.shape)} and {tuple(mask.shape)}"
            )
        if real.sum(-1).tolist() != lengths or not bool((real == there).all()):
            raise ValueError(
                f"spatial_shapes {list(shapes)} are images of {lengths} patches, but "
                f"pixel_attention_mask has {real.sum(-1).tolist()} of {mask.shape[1]}, which must "
                "stand first; give what one call of the processor returned"
            )
        return lengths

    def _positions(self, height: int, width: int) -> Tensor:
        """Positions ``(height * width, h)``, resized in fp32."""
        grid = self.position_embedding.unflatten(0, (self.grid, self.grid)).float()
        weight = self.position_embedding
        rows, columns = (_resizing(self.grid, size, weight.device) for size in (height, width))
        resized = torch.einsum("ag,bk,gkh->abh", rows, columns, grid)
        return resized.flatten(0, 1).to(weight.dtype)


def rows_per_image(inputs: Mapping[str, Any], patch: int, more: int) -> list[int]:
    """Return the rows that a tower makes of each image.

    Args:
        inputs: of the tower's ``forward``.
        patch: side of a patch, in pixels.
        more: rows of an image beside those of its patches, less those that are left out.
    """
    if "spatial_shapes" in inputs:
        return [high * wide + more for high, wide in inputs["spatial_shapes"].tolist()]
    images, _, high, wide = inputs["pixel_values"].shape
    return [(high // patch) * (wide // patch) + more] * images


def _resizing(source: int, size: int, device: torch.device) -> Tensor:
    """Return the weights ``(size, source)`` of a bilinear, antialiased resize along one dim."""
    scale = source / size
    center = (torch.arange(size, device=device, dtype=torch.float32) + 0.5) * scale - 0.5
    distance = (torch.arange(source, device=device) - center[:, None]).abs()
    weights = (1 - distance / max(scale, 1.0)).clamp(min=0)
    return weights / weights.sum(-1, keepdim=True)
