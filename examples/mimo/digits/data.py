# SPDX-License-Identifier: Apache-2.0
"""Batches of scanned handwritten digits: four images, one question, four answer tokens.

The 1,797 images come with scikit-learn (``load_digits``, 8x8 pixels of 0..16). One sample is::

    <bos> [<img> * * * *] x 4  <read> <number> <:>  d d d d  <eos>  <pad> <pad> <pad>

where every ``*`` is replaced by one row of the vision encoder's output (one row per 4x4 patch) and
every ``d`` is an answer digit; with varied samples there are one to four of both. A batch is a pure
function of (seed, step): every rank computes any slice of it without asking another rank, whatever
the layout.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from errors import INSTALL_HINT, JobError

from megatron.core.models.mimo.comm.routes import RoutePlan

IMAGE_SIDE = 8
PATCH_SIDE = 4
TOKENS_PER_IMAGE = (IMAGE_SIDE // PATCH_SIDE) ** 2
IMAGES_PER_SAMPLE = 4
SEQUENCE_LENGTH = 32
VOCABULARY_SIZE = 64  # 20 are used; 64 lets tensor parallelism of up to 64 divide it
MAX_PIXEL = 16.0
SPLIT_SEED = 1797  # the split never follows --seed: held-out images stay held out
HELD_OUT_SHARE = 0.2


class Token(enum.IntEnum):
    """The vocabulary; digit ``d`` is ``ZERO + d``."""

    PAD = 0
    BOS = 1
    EOS = 2
    IMAGE_START = 3
    IMAGE = 4
    READ = 5
    NUMBER = 6
    COLON = 7
    ZERO = 10


_QUESTION = (Token.READ, Token.NUMBER, Token.COLON)


def answer_start(images: int) -> int:
    """The first position of the answer in a sample of so many images."""
    return 1 + images * (1 + TOKENS_PER_IMAGE) + len(_QUESTION)


ANSWER_START = answer_start(IMAGES_PER_SAMPLE)
ANSWER_SLOTS = range(ANSWER_START, ANSWER_START + IMAGES_PER_SAMPLE)
"""Positions of ``input_ids`` that hold the answer digits."""
READING_POSITIONS = range(ANSWER_START - 1, ANSWER_START - 1 + IMAGES_PER_SAMPLE)
"""Positions whose output predicts an answer digit (labels are shifted by one)."""


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


@dataclass(frozen=True)
class Batch:
    """One (slice of a) microbatch; ``b`` samples on the language side, ``v`` on the vision side.

    Attributes:
        input_ids: ``(b, 32)`` int64.
        labels: ``(b, 32)`` int64, ``input_ids`` shifted left by one.
        loss_mask: ``(b, 32)`` float32, 1 where an answer digit is predicted and counted.
        position_ids: ``(b, 32)`` int64.
        images: ``(v * 4, 1, 8, 8)`` float32 in -1..1, all of a sample before the next sample; fewer
            with varied samples.
        digits: ``(b, 4)`` int64, what the language side's samples show; those of varied samples
            that show fewer are at the front.
        counted: ``(b, 4)`` bool, false for repeats that only fill up the last held-out batch, and
            for what is not shown.
        lengths: tokens of each of the language side's samples up to its ``<eos>``.
        image_counts: images of each of the vision side's samples.
        routes: modality -> this rank's way over the bridge, if it was planned with the batch.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    position_ids: torch.Tensor
    images: torch.Tensor
    digits: torch.Tensor
    counted: torch.Tensor
    lengths: tuple[int, ...]
    image_counts: tuple[int, ...]
    routes: Mapping[str, RoutePlan] | None = None

    def to(self, device: torch.device) -> Batch:
        """The tensors on a device."""
        tensors = {k: v for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return replace(self, **{name: value.to(device) for name, value in tensors.items()})

    def language(self, start: int, size: int) -> Batch:
        """Narrow everything but the images to ``size`` samples from ``start``."""
        names = ("input_ids", "labels", "loss_mask", "position_ids", "digits", "counted", "lengths")
        return replace(self, **{name: getattr(self, name)[start : start + size] for name in names})

    def vision(self, start: int, size: int) -> Batch:
        """Narrow the images to those of ``size`` samples from ``start``."""
        counts = self.image_counts[start : start + size]
        begin = sum(self.image_counts[:start])
        return replace(self, images=self.images[begin : begin + sum(counts)], image_counts=counts)


@functools.lru_cache(maxsize=1)
def _load() -> DigitImages:
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


class DigitsBatches:
    """Batches of ``global_batch_size`` samples; each is a pure function of (seed, step).

    ``"train"`` never ends: every image is used once per epoch, in an order drawn per epoch, and is
    shifted by up to one pixel. ``"held_out"`` has ``len(batches)`` batches that show every held-out
    image exactly once, unchanged; repeats fill up the last one and are not counted.
    """

    def __init__(
        self,
        seed: int,
        split: str,
        global_batch_size: int,
        *,
        images: DigitImages | None = None,
        augment: bool = True,
        uneven_loss_mask: bool = False,
        varied: bool = False,
    ) -> None:
        """Choose the images.

        Args:
            seed: of the order and of the shifts.
            split: ``"train"`` or ``"held_out"``.
            global_batch_size: samples per step over all ranks and microbatches.
            images: other images than scikit-learn's, split in the same way.
            augment: shift training images; held-out ones never are.
            uneven_loss_mask: count only the first 0..4 answer digits of each sample.
            varied: training samples show one to four images, so their lengths differ too.

        Raises:
            ValueError: for a negative seed, a batch size below 1, or an unknown split.
        """
        if seed < 0:
            raise ValueError(f"seed must be 0 or more, got {seed}")
        if global_batch_size < 1:
            raise ValueError(f"global_batch_size must be 1 or more, got {global_batch_size}")
        self.images = split_images(_load() if images is None else images, split)
        self.seed, self.split, self.global_batch_size = seed, split, global_batch_size
        self.augment = augment and split == "train"
        self.uneven_loss_mask = uneven_loss_mask
        self.varied = varied and split == "train"
        # Microbatches of one step follow each other: one batch is worth keeping.
        self._cached = functools.lru_cache(maxsize=1)(self._make_batch)

    def __len__(self) -> int:
        """Batches that cover the images once, the last one filled up."""
        return -(-len(self.images) // (self.global_batch_size * IMAGES_PER_SAMPLE))

    def __iter__(self) -> Iterator[Batch]:
        return (self.batch(step) for step in range(len(self)))

    def batch(self, step: int) -> Batch:
        """The global batch of ``step``.

        Raises:
            ValueError: for a negative step, or one past the last held-out batch.
        """
        if step < 0 or (self.split == "held_out" and step >= len(self)):
            last = "" if self.split == "train" else f"..{len(self) - 1}"
            raise ValueError(f"step {step} is not in 0{last} of the {self.split} images")
        return self._cached(step)

    def local_batch(
        self,
        step: int,
        microbatch: int,
        num_microbatches: int,
        *,
        src_dp_rank: int,
        src_dp: int,
        dest_dp_rank: int,
        dest_dp: int,
    ) -> Batch:
        """One rank's part of a microbatch: language tensors by dest DP, images by src DP.

        Both sides cut the same global microbatch into equal runs of samples in DP order, which is
        the order in which the bridge's slots line up.

        Raises:
            ValueError: batch, microbatches and DP sizes that do not divide, or a rank out of range.
        """
        batch = self.batch(step)
        start, size = even_slice(
            self.global_batch_size, microbatch, num_microbatches, "global batch", "microbatches"
        )
        language = even_slice(size, dest_dp_rank, dest_dp, "microbatch", "language DP ranks")
        vision = even_slice(size, src_dp_rank, src_dp, "microbatch", "vision DP ranks")
        return batch.language(start + language[0], language[1]).vision(start + vision[0], vision[1])

    def image_tokens(self, step: int, microbatch: int, num_microbatches: int) -> np.ndarray:
        """Where a microbatch's image tokens stand, all replicas' samples: bool ``(samples, 32)``.

        Raises:
            ValueError: as :meth:`local_batch`.
        """
        start, size = even_slice(
            self.global_batch_size, microbatch, num_microbatches, "global batch", "microbatches"
        )
        return (self.batch(step).input_ids[start : start + size] == int(Token.IMAGE)).numpy()

    def lengths(self, step: int, microbatch: int, num_microbatches: int) -> np.ndarray:
        """Tokens of each of a microbatch's samples, all replicas': int64 ``(samples,)``.

        Raises:
            ValueError: as :meth:`local_batch`.
        """
        start, size = even_slice(
            self.global_batch_size, microbatch, num_microbatches, "global batch", "microbatches"
        )
        return np.array(self.batch(step).lengths[start : start + size])

    def _make_batch(self, step: int) -> Batch:
        chosen, counted = self._choose(step)
        rng = np.random.default_rng([self.seed, step, 1])
        pixels = self.images.pixels[chosen]
        if self.augment:
            pixels = _shift(pixels, rng.integers(-1, 2, size=(len(pixels), 2)))
        digits = self.images.digits[chosen].reshape(-1, IMAGES_PER_SAMPLE)
        shown = np.full(len(digits), IMAGES_PER_SAMPLE)
        if self.varied:
            draw = np.random.default_rng([self.seed, step, 2])
            shown = draw.integers(1, IMAGES_PER_SAMPLE + 1, size=len(digits))
        counted = counted.reshape(digits.shape) & (np.arange(IMAGES_PER_SAMPLE) < shown[:, None])
        in_loss = counted
        if self.uneven_loss_mask:
            kept = rng.integers(0, IMAGES_PER_SAMPLE + 1, size=(len(digits), 1))
            in_loss = counted & (np.arange(IMAGES_PER_SAMPLE) < kept)
        return _to_tensors(pixels, digits, shown, counted, in_loss)

    def _choose(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices of the step's images and whether each counts, both ``(batch * 4,)``."""
        per_step, total = self.global_batch_size * IMAGES_PER_SAMPLE, len(self.images)
        positions = np.arange(step * per_step, (step + 1) * per_step)
        if self.split == "held_out":
            return positions % total, positions < total
        epochs = positions // total
        chosen = np.empty_like(positions)
        for epoch in np.unique(epochs):
            order = np.random.default_rng([self.seed, int(epoch), 0]).permutation(total)
            chosen[epochs == epoch] = order[positions[epochs == epoch] % total]
        return chosen, np.ones(per_step, dtype=bool)


def even_slice(count: int, index: int, parts: int, whole: str, part: str) -> tuple[int, int]:
    """``(start, size)`` of part ``index`` when ``count`` samples are cut into equal ``parts``.

    >>> even_slice(8, 1, 4, "microbatch", "DP ranks")
    (2, 2)

    Raises:
        ValueError: when ``parts`` does not divide ``count`` or ``index`` is out of range.
    """
    if parts < 1 or count % parts:
        raise ValueError(
            f"a {whole} of {count} samples cannot be divided evenly over {parts} {part}; "
            f"use a multiple of {max(parts, 1)} samples"
        )
    if not 0 <= index < parts:
        raise ValueError(f"index {index} is not in 0..{parts - 1} of the {parts} {part}")
    return index * (count // parts), count // parts


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


def with_answer(input_ids: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
    """A copy whose answer slots hold only the ``k`` digits read so far, ``read`` being ``(b, k)``.

    With ``k = 0`` the answer is hidden altogether: nothing leaks when a model is asked to read.
    """
    known = read.shape[1]
    result = input_ids.clone()
    result[:, ANSWER_START:] = int(Token.PAD)
    result[:, ANSWER_START : ANSWER_START + known] = read + int(Token.ZERO)
    return result


def _shift(pixels: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Move each image ``(n, 8, 8)`` by its own ``(dy, dx)`` of -1..1; black moves in."""
    padded = np.pad(pixels, ((0, 0), (1, 1), (1, 1)))
    span = np.arange(IMAGE_SIDE)
    rows = span[None, :, None] + 1 - offsets[:, 0, None, None]
    columns = span[None, None, :] + 1 - offsets[:, 1, None, None]
    return padded[np.arange(len(pixels))[:, None, None], rows, columns]


def _to_tensors(
    pixels: np.ndarray,
    digits: np.ndarray,
    shown: np.ndarray,
    counted: np.ndarray,
    in_loss: np.ndarray,
) -> Batch:
    """A global batch; ``shown`` ``(samples,)`` says how many of its digits a sample has."""
    count = len(digits)
    tokens = np.full((count, SEQUENCE_LENGTH + 1), int(Token.PAD), dtype=np.int64)
    loss_mask = np.zeros((count, SEQUENCE_LENGTH), dtype=np.float32)
    one_image = [Token.IMAGE_START] + [Token.IMAGE] * TOKENS_PER_IMAGE
    for images in np.unique(shown):
        rows, start = np.flatnonzero(shown == images), answer_start(images)
        prompt = [Token.BOS] + one_image * images + list(_QUESTION)
        tokens[rows, :start] = [int(token) for token in prompt]
        tokens[rows, start : start + images] = digits[rows, :images] + int(Token.ZERO)
        tokens[rows, start + images] = int(Token.EOS)
        loss_mask[rows, start - 1 : start - 1 + images] = in_loss[rows, :images]
    pixels = pixels[(np.arange(IMAGES_PER_SAMPLE) < shown[:, None]).reshape(-1)]
    return Batch(
        input_ids=torch.from_numpy(tokens[:, :-1].copy()),
        labels=torch.from_numpy(tokens[:, 1:].copy()),
        loss_mask=torch.from_numpy(loss_mask),
        position_ids=torch.arange(SEQUENCE_LENGTH).expand(count, -1).contiguous(),
        images=torch.from_numpy((pixels / (MAX_PIXEL / 2) - 1.0)[:, None].astype(np.float32)),
        digits=torch.from_numpy(digits.copy()),
        counted=torch.from_numpy(counted.copy()),
        lengths=tuple((answer_start(shown) + shown + 1).tolist()),
        image_counts=tuple(shown.tolist()),
    )
