# SPDX-License-Identifier: Apache-2.0
"""The 1,797 scanned digits that come with scikit-learn (``load_digits``), and their patches."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch

from examples.mimo.digits import INSTALL_HINT
from mimo_colocated.launch.errors import JobError

IMAGE_SIDE = 8
PATCH_SIDE = 4
TOKENS_PER_IMAGE = (IMAGE_SIDE // PATCH_SIDE) ** 2
MAX_PIXEL = 16.0
SPLIT_SEED = 1797  # the split never follows --seed: held-out images stay held out
HELD_OUT_SHARE = 0.2


@dataclass(frozen=True)
class DigitImages:
    """Images ``(n, 8, 8)`` float32 in 0..16 and what they show, ``(n,)`` int64 in 0..9."""

    pixels: np.ndarray
    digits: np.ndarray

    def __post_init__(self) -> None:
        """Refuse images that the model would misread.

        Raises:
            ValueError: wrong shape, label count, pixel range or label range.
        """
        shape, count = self.pixels.shape, self.digits.shape
        if len(shape) != 3 or shape[1:] != (IMAGE_SIDE, IMAGE_SIDE) or shape[0] == 0:
            raise ValueError(
                f"images have the shape {shape}, but (n, {IMAGE_SIDE}, {IMAGE_SIDE}) with n > 0 "
                "is needed; resize them first"
            )
        if count != shape[:1]:
            raise ValueError(
                f"{shape[0]} images came with labels of the shape {count}; "
                f"give one label per image, ({shape[0]},)"
            )
        low, high = float(self.pixels.min()), float(self.pixels.max())
        if not (low >= 0.0 and high <= MAX_PIXEL):  # also false for NaN
            raise ValueError(
                f"pixels range over {low:g}..{high:g}, but 0..{MAX_PIXEL:g} is needed; rescale them"
            )
        if not np.isin(self.digits, np.arange(10)).all():
            raise ValueError(f"labels must be digits 0..9, got {sorted(set(self.digits.tolist()))}")

    def __len__(self) -> int:
        return len(self.digits)


@functools.lru_cache(maxsize=1)
def load_images() -> DigitImages:
    """scikit-learn's.

    Raises:
        JobError: scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise JobError(
            f"the digits come with scikit-learn, which is missing; {INSTALL_HINT}"
        ) from error
    scanned = load_digits()
    return DigitImages(scanned.images.astype(np.float32), scanned.target.astype(np.int64))


def split_images(images: DigitImages, split: str) -> DigitImages:
    """The ``"train"`` or ``"held_out"`` part of ``images``: about 80/20 of every digit.

    Raises:
        ValueError: for another split name.
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"split must be 'train' or 'held_out', got {split!r}")
    order = np.random.default_rng(SPLIT_SEED).permutation(len(images))
    held_out = np.zeros(len(images), dtype=bool)
    for digit in range(10):
        of_digit = order[images.digits[order] == digit]
        held_out[of_digit[: round(len(of_digit) * HELD_OUT_SHARE)]] = True
    chosen = order[held_out[order] == (split == "held_out")]
    return DigitImages(images.pixels[chosen], images.digits[chosen])


def shift_images(pixels: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Move each image ``(n, 8, 8)`` by its own ``(dy, dx)`` of -1..1; black moves in."""
    padded = np.pad(pixels, ((0, 0), (1, 1), (1, 1)))
    span = np.arange(IMAGE_SIDE)
    rows = span[None, :, None] + 1 - offsets[:, 0, None, None]
    columns = span[None, None, :] + 1 - offsets[:, 1, None, None]
    return padded[np.arange(len(pixels))[:, None, None], rows, columns]


def image_patches(images: torch.Tensor) -> torch.Tensor:
    """Cut images ``(n, 1, 8, 8)`` into patches ``(n, 4, 16)``, row by row.

    Raises:
        ValueError: for images of another shape.
    """
    if images.dim() != 4 or tuple(images.shape[1:]) != (1, IMAGE_SIDE, IMAGE_SIDE):
        raise ValueError(
            f"images have the shape {tuple(images.shape)}, but (n, 1, {IMAGE_SIDE}, {IMAGE_SIDE}) "
            "is needed; resize them first"
        )
    side, per_row = PATCH_SIDE, IMAGE_SIDE // PATCH_SIDE
    grid = images.reshape(len(images), per_row, side, per_row, side)
    return grid.transpose(2, 3).reshape(len(images), TOKENS_PER_IMAGE, side * side)
