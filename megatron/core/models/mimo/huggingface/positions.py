# SPDX-License-Identifier: Apache-2.0
"""Positions of text and image tokens by time, height and width, as Qwen's models count them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from megatron.core.models.mimo.huggingface.family import UnsupportedModelError
from megatron.core.models.mimo.towers.image_grids import Grid


def multimodal_positions(
    config: Any,
    input_ids: Tensor,
    image_grid_thw: Tensor | None = None,
    *,
    attention_mask: Tensor | None = None,
    cu_seqlens: Sequence[int] | Tensor | None = None,
) -> Tensor:
    """Return the position ids of a batch, those of transformers' ``get_rope_index``.

    Every sample and every packed sequence counts from 0. A text token is one further than what is
    before it in all three; an image's tokens count its merged rows and columns from there, and what
    follows is beyond the larger of the two.

    Args:
        config: transformers' configuration of the whole model.
        input_ids: ``(b, s)``, on any device.
        image_grid_thw: ``(images, 3)``, of the batch's images in the order of their tokens; None
            without images.
        attention_mask: ``(b, s)``, 0 at padding, which gets position 0; None without padding.
        cu_seqlens: of a packed batch, ``(1, s)``: where its sequences start, and ``s``.

    Returns:
        ``(3, b, s)``, int64: time, height, width.

    Raises:
        UnsupportedModelError: there are tokens of videos.
        ValueError: the image tokens are not those of the grids; a packed batch of several rows,
            or one with a mask.
    """
    if (input_ids == config.video_token_id).any():
        raise UnsupportedModelError(
            f"input_ids have tokens of videos (video_token_id={config.video_token_id}), which are "
            "not supported; give frames as images"
        )
    bounds = _bounds(input_ids, attention_mask, cu_seqlens)
    merge = config.vision_config.spatial_merge_size
    grids = [] if image_grid_thw is None else image_grid_thw.tolist()
    images = iter([(t, h // merge, w // merge) for t, h, w in grids])
    is_image = (input_ids == config.image_token_id).cpu()
    real = torch.ones_like(is_image) if attention_mask is None else attention_mask.cpu().bool()
    positions = torch.zeros(3, *input_ids.shape, dtype=torch.int64)
    for sample in range(input_ids.size(0)):
        for start, stop in pairwise(bounds):
            counted = real[sample, start:stop].nonzero().flatten() + start
            positions[:, sample, counted] = _of_sequence(is_image[sample, counted], images)
    left = len(list(images))
    if left:
        raise ValueError(
            f"image_grid_thw has {len(grids)} images, but input_ids have tokens of "
            f"{len(grids) - left}; give the grids of this batch's images"
        )
    return positions.to(input_ids.device)


def _bounds(
    input_ids: Tensor, attention_mask: Tensor | None, cu_seqlens: Sequence[int] | Tensor | None
) -> list[int]:
    if cu_seqlens is None:
        return [0, input_ids.size(1)]
    bounds = [int(bound) for bound in cu_seqlens]
    if attention_mask is not None or input_ids.size(0) != 1 or bounds[-1] != input_ids.size(1):
        raise ValueError(
            "a packed batch is one row without attention_mask whose length is the last of "
            f"cu_seqlens, got input_ids {tuple(input_ids.shape)}, cu_seqlens that end at "
            f"{bounds[-1]} and {'no' if attention_mask is None else 'an'} attention_mask"
        )
    return bounds


def _of_sequence(is_image: Tensor, images: Iterator[Grid]) -> Tensor:
    """Positions ``(3, s)`` of one sequence; takes its images, in rows, from ``images``."""
    pieces, at, start = [torch.empty(3, 0, dtype=torch.int64)], 0, 0
    turns = (is_image.int().diff() != 0).nonzero().flatten() + 1
    for end in (*turns.tolist(), len(is_image)):
        while at < end:
            if is_image[at]:
                t, h, w = _next_image(images)
                size, beyond, piece = t * h * w, max(h, w), _of_image(t, h, w)
            else:
                size = beyond = end - at
                piece = torch.arange(size).expand(3, -1)
            if at + size > end:
                raise ValueError(
                    f"an image of {size} tokens starts at token {at} of its sequence, which has "
                    f"{end - at} for it; a sequence must not be cut within an image"
                )
            pieces.append(piece + start)
            at, start = at + size, start + beyond
    return torch.cat(pieces, dim=1)


def _next_image(images: Iterator[Grid]) -> Grid:
    found = next(images, None)
    if found is None:
        raise ValueError("input_ids have more image tokens than image_grid_thw has images for")
    return found


def _of_image(t: int, h: int, w: int) -> Tensor:
    return torch.cartesian_prod(torch.arange(t), torch.arange(h), torch.arange(w)).view(-1, 3).T
