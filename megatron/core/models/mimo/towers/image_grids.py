# SPDX-License-Identifier: Apache-2.0
"""Where the patches of images of different sizes stand: pure integers, on the host.

A grid ``(t, h, w)`` counts the patches of an image: frames, rows, columns. Patches come frame by
frame and, within a frame, in *merge order*: square by square, the ``merge * merge`` patches of a
square together, since a merger makes one row of each. The squares are the *units*::

    merge 2, grid (1, 4, 4)     0  1 |  4  5
                                2  3 |  6  7
                                ------+------
                                8  9 | 12 13
                               10 11 | 14 15
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Grid = tuple[int, int, int]


def checked_grids(grids: Tensor, merge: int, patches: int) -> list[Grid]:
    """Return the grids of images as integers.

    Args:
        grids: ``(images, 3)``.
        merge: side of a unit in patches.
        patches: that came with the grids.

    Raises:
        ValueError: another shape, a side that is not made of whole units, or another number of
            patches than came.
    """
    if grids.dim() != 2 or grids.size(1) != 3:
        raise ValueError(f"image_grid_thw must be (images, 3), got {tuple(grids.shape)}")
    found: list[Grid] = [tuple(grid) for grid in grids.tolist()]
    for grid in found:
        if min(grid) < 1 or grid[1] % merge or grid[2] % merge:
            raise ValueError(
                f"image_grid_thw has {list(grid)}; frames, rows and columns must be positive, and "
                f"rows and columns multiples of {merge}, the model's spatial_merge_size"
            )
    told = sum(patches_of(found))
    if told != patches:
        raise ValueError(
            f"image_grid_thw {[list(grid) for grid in found]} tells of {told} patches, but "
            f"pixel_values has {patches}; give both of the same images"
        )
    return found


def patches_of(grids: Sequence[Grid]) -> list[int]:
    """Return the patches of each image.

    >>> patches_of([(1, 4, 6), (2, 4, 4)])
    [24, 32]
    """
    return [t * h * w for t, h, w in grids]


def frame_lengths(grids: Sequence[Grid]) -> list[int]:
    """Return the patches of each frame of each image, within which patches see each other.

    >>> frame_lengths([(1, 4, 6), (2, 4, 4)])
    [24, 16, 16]
    """
    return [h * w for t, h, w in grids for _ in range(t)]


def patch_places(grids: Sequence[Grid], merge: int) -> Tensor:
    """Return row and column of each patch in its frame: ``(patches, 2)``.

    >>> patch_places([(1, 2, 4)], 2).tolist()
    [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3]]
    """
    places = []
    for frames, height, width in grids:
        each = torch.cartesian_prod(torch.arange(height), torch.arange(width))
        squares = each.view(height // merge, merge, width // merge, merge, 2).transpose(1, 2)
        places.append(squares.reshape(-1, 2).repeat(frames, 1))
    return torch.cat(places) if places else torch.empty(0, 2, dtype=torch.int64)


@dataclass(frozen=True)
class Windows:
    """Units in the order of attention windows.

    Attributes:
        order: index of the unit that stands at each place: ``(units,)``.
        lengths: units of each window.
    """

    order: Tensor
    lengths: tuple[int, ...]


def windows_of(grids: Sequence[Grid], merge: int, side: int) -> Windows:
    """Return the square windows of images, smaller ones at right and lower edges.

    Args:
        grids: of the images.
        merge: side of a unit in patches.
        side: of a window in units.

    >>> windows_of([(1, 2, 6)], merge=2, side=2)
    Windows(order=tensor([0, 1, 2]), lengths=(2, 1))
    >>> windows_of([(1, 4, 6)], merge=2, side=2)
    Windows(order=tensor([0, 1, 3, 4, 2, 5]), lengths=(4, 2))
    """
    pieces, first = [], 0
    for frames, height, width in grids:
        rows, columns = height // merge, width // merge
        units = torch.arange(frames * rows * columns).view(frames, rows, columns) + first
        pieces += [
            units[frame, row : row + side, column : column + side].flatten()
            for frame in range(frames)
            for row in range(0, rows, side)
            for column in range(0, columns, side)
        ]
        first += units.numel()
    order = torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64)
    return Windows(order, tuple(map(len, pieces)))


def interpolation(grids: Sequence[Grid], merge: int, side: int) -> tuple[Tensor, Tensor]:
    """Return how a square table of positions is resampled to each image's grid, bilinearly.

    The corners of an image are those of the table.

    Args:
        grids: of the images.
        merge: side of a unit in patches.
        side: of the table.

    Returns:
        indices: of four entries of the table per patch, ``(patches, 4)``.
        weights: of them, ``(patches, 4)``, fp32.
    """
    places = patch_places(grids, merge)
    sizes = torch.tensor([[h, w] for _, h, w in grids]).view(-1, 2)
    sizes = sizes.repeat_interleave(torch.tensor(patches_of(grids), dtype=torch.int64), dim=0)
    exact = places.float() * (side - 1) / (sizes - 1).clamp(min=1)
    below = exact.floor()
    taps = (below.long()[..., None] + torch.arange(2)).clamp(max=side - 1)
    share = exact - below
    weights = torch.stack((1 - share, share), dim=-1)
    indices = taps[:, 0, :, None] * side + taps[:, 1, None, :]
    return indices.flatten(1), (weights[:, 0, :, None] * weights[:, 1, None, :]).flatten(1)
