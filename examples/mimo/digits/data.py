# SPDX-License-Identifier: Apache-2.0
"""Batches of handwritten and spoken digits: four of them, one question, four answer tokens.

The images are scikit-learn's (``images.py``). One sample is::

    <bos> [<img> * * * *] x 4  <read> <number> <:>  d d d d  <eos>  <pad> <pad> <pad>

where every ``*`` is replaced by one row of the vision encoder's output (one row per 4x4 patch) and
every ``d`` is an answer digit; with varied samples there are one to four of both. With ``audio`` a
digit may come as a sound instead (``sounds.py``)::

    <sound> ~ ~ ~ ~     each ~ is replaced by one row of the audio encoder's output
    <text> n n n n      n is the token that names the digit

and a sample shows images, sounds, any of both, or text alone. A batch is a pure function of (seed,
step): every rank computes any slice of it without asking another rank, whatever the layout.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from examples.mimo.digits.images import (
    MAX_PIXEL,
    SPLIT_SEED,
    TOKENS_PER_IMAGE,
    DigitImages,
    load_images,
    shift_images,
    split_images,
)
from examples.mimo.digits.options import SEQUENCE_LENGTH
from examples.mimo.digits.sounds import TOKENS_PER_SOUND, Clips
from megatron.core.models.mimo.comm.plan.routes import RoutePlan
from megatron.core.models.mimo.job.samples import even_slice, shuffled
from megatron.core.models.mimo.uploads import upload

DIGITS_PER_SAMPLE = 4
TOKENS_PER_DIGIT = 4  # of an image's, a sound's and a text's
assert TOKENS_PER_IMAGE == TOKENS_PER_SOUND == TOKENS_PER_DIGIT
VOCABULARY_SIZE = 64  # fewer are used; 64 lets tensor parallelism of up to 64 divide it


class Token(enum.IntEnum):
    """The vocabulary; digit ``d`` is ``ZERO + d`` in an answer and ``NAME + d`` in a text."""

    PAD = 0
    BOS = 1
    EOS = 2
    IMAGE_START = 3
    IMAGE = 4
    READ = 5
    NUMBER = 6
    COLON = 7
    SOUND_START = 8
    SOUND = 9
    ZERO = 10
    TEXT_START = 20
    NAME = 32


class Kind(enum.IntEnum):
    """How a digit is shown."""

    IMAGE = 0
    SOUND = 1
    TEXT = 2


_NOT_SHOWN = -1
# What a sample shows: images, sounds, text, or either of the first two for each digit.
_EITHER = 3
_TRAIN_SHARES = (5 / 16, 5 / 16, 1 / 16, 5 / 16)
_HELD_OUT_SHARES = (1 / 3, 1 / 3, 0.0, 1 / 3)
# So many samples follow each other alike, so that some replicas and microbatches have no sound, or
# no image.
_ALIKE = 4

_QUESTION = (Token.READ, Token.NUMBER, Token.COLON)


def answer_start(digits: int) -> int:
    """The first position of the answer in a sample of so many digits."""
    return 1 + digits * (1 + TOKENS_PER_DIGIT) + len(_QUESTION)


ANSWER_START = answer_start(DIGITS_PER_SAMPLE)
ANSWER_SLOTS = range(ANSWER_START, ANSWER_START + DIGITS_PER_SAMPLE)
"""Positions of ``input_ids`` that hold the answer digits."""
READING_POSITIONS = range(ANSWER_START - 1, ANSWER_START - 1 + DIGITS_PER_SAMPLE)
"""Positions whose output predicts an answer digit (labels are shifted by one)."""


@dataclass(frozen=True)
class Batch:
    """One (slice of a) microbatch; ``b`` samples on the language side, others on the encoders'.

    A *slot* is a digit's place in the step: 4 * sample + 0..3.

    Attributes:
        input_ids, position_ids: ``(b, 32)`` int64.
        labels: ``(b, 32)`` int64, ``input_ids`` shifted left by one.
        loss_mask: ``(b, 32)`` float32, 1 where an answer digit is predicted and counted.
        images: ``(v, 1, 8, 8)`` float32 in -1..1, all of a sample before the next sample.
        image_slots: ``(v,)`` int64, ascending.
        clips: the sounds, in ascending order of their slots; made where they are encoded.
        digits: ``(b, 4)`` int64, what the language side's samples show, at the front.
        kinds: ``(b, 4)`` int64, how they show it (:class:`Kind`); -1 for what is not shown.
        counted: ``(b, 4)`` bool, false for repeats that fill up, and for what is not shown.
        lengths: tokens of each of the language side's samples up to its ``<eos>``.
        routes: modality -> this rank's way over the bridge, if it was planned with the batch.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    position_ids: torch.Tensor
    images: torch.Tensor
    image_slots: torch.Tensor
    clips: Clips
    digits: torch.Tensor
    kinds: torch.Tensor
    counted: torch.Tensor
    lengths: tuple[int, ...]
    routes: Mapping[str, RoutePlan] | None = None

    def to(self, device: torch.device) -> Batch:
        """The tensors on a device."""
        tensors = {k: v for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return replace(self, **{name: upload(value, device) for name, value in tensors.items()})

    def samples(self, start: int, size: int) -> Batch:
        """Narrow everything but images and sounds to ``size`` samples from ``start``."""
        names = ("input_ids", "labels", "loss_mask", "position_ids")
        names += ("digits", "kinds", "counted", "lengths")
        return replace(self, **{name: getattr(self, name)[start : start + size] for name in names})

    def images_of(self, start: int, size: int) -> Batch:
        """Narrow the images to those of ``size`` samples of the step from ``start``."""
        sample = self.image_slots // DIGITS_PER_SAMPLE
        kept = (sample >= start) & (sample < start + size)
        return replace(self, images=self.images[kept], image_slots=self.image_slots[kept])

    def sounds_of(self, start: int, size: int) -> Batch:
        """Narrow the sounds to those of ``size`` samples of the step from ``start``."""
        slots = start * DIGITS_PER_SAMPLE, (start + size) * DIGITS_PER_SAMPLE
        return replace(self, clips=self.clips.between(*slots))

    def items(self, modality: str) -> torch.Tensor:
        """What a modality's encoder encodes, on the device of the rest."""
        if modality == "images":
            return self.images
        return upload(torch.from_numpy(self.clips.spectra), self.images.device)


class DigitsBatches:
    """Batches of ``global_batch_size`` samples; each is a pure function of (seed, step).

    ``"train"`` never ends: every image is used once per epoch, in an order drawn per epoch, and is
    shifted by up to one pixel. ``"held_out"`` has ``len(batches)`` batches that show every held-out
    image exactly once, unchanged; repeats fill up the last one and are not counted. With ``audio``
    they do so three times: each digit is shown once as an image, as a sound and as text.

    Args:
        seed: of the order, of the shifts, and of all about sounds.
        split: ``"train"`` or ``"held_out"``.
        global_batch_size: samples per step over all ranks and microbatches.
        images: other images than scikit-learn's, split in the same way.
        augment: shift training images; held-out ones never are.
        uneven_loss_mask: count only the first 0..4 answer digits of each sample.
        varied: training samples show one to four digits, so their lengths differ too.
        audio: show digits as sounds and text, too.

    Raises:
        ValueError: for a negative seed, a batch size below 1, or an unknown split.
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
        audio: bool = False,
    ) -> None:
        if seed < 0:
            raise ValueError(f"seed must be 0 or more, got {seed}")
        if global_batch_size < 1:
            raise ValueError(f"global_batch_size must be 1 or more, got {global_batch_size}")
        self.images = split_images(load_images() if images is None else images, split)
        self.seed, self.split, self.global_batch_size = seed, split, global_batch_size
        self.augment = augment and split == "train"
        self.uneven_loss_mask, self.audio = uneven_loss_mask, audio
        self.varied = varied and split == "train"
        # Microbatches of one step follow each other: one batch is worth keeping.
        self._cached = functools.lru_cache(maxsize=1)(self._make_batch)

    def __len__(self) -> int:
        """Batches that show each image once, in each way; the last of a way is filled up."""
        return self._per_pass * (len(Kind) if self.audio else 1)

    @property
    def _per_pass(self) -> int:
        return -(-len(self.images) // (self.global_batch_size * DIGITS_PER_SAMPLE))

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
        self, step: int, microbatch: int, count: int, parts: Mapping[str, tuple[int, int]]
    ) -> Batch:
        """One rank's part of a microbatch, of ``count`` in a step.

        All modules cut it into equal runs of samples in DP order, as the bridge's slots line up.

        Args:
            step, microbatch, count: which.
            parts: "language", "images" or "audio" -> (DP rank, DP size); whole where it is absent.

        Raises:
            ValueError: sizes that do not divide, or a rank out of range.
        """
        batch, (start, size) = self.batch(step), self._of_microbatch(microbatch, count)
        narrow = {"language": Batch.samples, "images": Batch.images_of, "audio": Batch.sounds_of}
        for module, narrowed in narrow.items():
            rank, ranks = parts.get(module, (0, 1))
            name = {"images": "vision"}.get(module, module)
            first, own = even_slice(size, rank, ranks, "microbatch", f"{name} DP ranks")
            batch = narrowed(batch, start + first, own)
        return batch

    def tokens(self, token: int, step: int, microbatch: int, count: int) -> np.ndarray:
        """Where a microbatch has ``token``, all replicas' samples: bool ``(samples, 32)``."""
        start, size = self._of_microbatch(microbatch, count)
        return (self.batch(step).input_ids[start : start + size] == token).numpy()

    def lengths(self, step: int, microbatch: int, count: int) -> np.ndarray:
        """Tokens of each of a microbatch's samples, all replicas': int64 ``(samples,)``."""
        start, size = self._of_microbatch(microbatch, count)
        return np.array(self.batch(step).lengths[start : start + size])

    def _of_microbatch(self, microbatch: int, count: int) -> tuple[int, int]:
        samples = self.global_batch_size
        return even_slice(samples, microbatch, count, "global batch", "microbatches")

    def _make_batch(self, step: int) -> Batch:
        chosen, counted = self._choose(step)
        rng = np.random.default_rng([self.seed, step, 1])
        pixels = self.images.pixels[chosen]
        if self.augment:
            pixels = shift_images(pixels, rng.integers(-1, 2, size=(len(pixels), 2)))
        digits = self.images.digits[chosen].reshape(-1, DIGITS_PER_SAMPLE)
        kinds = self._kinds(step)
        if self.varied:
            draw = np.random.default_rng([self.seed, step, 2])
            shown = draw.integers(1, DIGITS_PER_SAMPLE + 1, size=(len(digits), 1))
            kinds = np.where(np.arange(DIGITS_PER_SAMPLE) < shown, kinds, _NOT_SHOWN)
        counted = counted.reshape(digits.shape) & (kinds != _NOT_SHOWN)
        in_loss = counted
        if self.uneven_loss_mask:
            kept = rng.integers(0, DIGITS_PER_SAMPLE + 1, size=(len(digits), 1))
            in_loss = counted & (np.arange(DIGITS_PER_SAMPLE) < kept)
        return _to_tensors(pixels, digits, kinds, counted, in_loss, self._stream(step))

    def _stream(self, step: int) -> tuple[int, ...]:
        """Seeds of what is drawn for a step's sounds; the held-out ones do not follow --seed."""
        return (SPLIT_SEED, step, 2) if self.split == "held_out" else (self.seed, step, 3)

    def _kinds(self, step: int) -> np.ndarray:
        """How each digit of a step is shown, ``(samples, 4)``."""
        samples = self.global_batch_size
        if not self.audio:
            return np.full((samples, DIGITS_PER_SAMPLE), int(Kind.IMAGE))
        if self.split == "train":
            return _draw_kinds(np.random.default_rng([self.seed, step, 4]), samples, _TRAIN_SHARES)
        shown_before, step = divmod(step, self._per_pass)
        rng = np.random.default_rng([SPLIT_SEED, step, 5])
        return (_draw_kinds(rng, samples, _HELD_OUT_SHARES) + shown_before) % len(Kind)

    def _choose(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices of the step's digits and whether each counts, both ``(batch * 4,)``."""
        per_step, total = self.global_batch_size * DIGITS_PER_SAMPLE, len(self.images)
        if self.split == "held_out":
            positions = step % self._per_pass * per_step + np.arange(per_step)
            return positions % total, positions < total
        positions = np.arange(step * per_step, (step + 1) * per_step)
        return shuffled(positions, total, self.seed), np.ones(per_step, dtype=bool)


def with_answer(input_ids: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
    """A copy whose answer slots hold only the ``k`` digits read so far, ``(b, k)``."""
    known = read.shape[1]
    result = input_ids.clone()
    result[:, ANSWER_START:] = int(Token.PAD)
    result[:, ANSWER_START : ANSWER_START + known] = read + int(Token.ZERO)
    return result


def _draw_kinds(rng: np.random.Generator, samples: int, shares: tuple[float, ...]) -> np.ndarray:
    """Kinds ``(samples, 4)``, in runs of samples that show the same."""
    runs = rng.choice(len(shares), size=-(-samples // _ALIKE), p=shares)
    shown = np.repeat(runs, _ALIKE)[:samples, None]
    either = rng.integers(0, 2, size=(samples, DIGITS_PER_SAMPLE))  # IMAGE or SOUND
    return np.where(shown == _EITHER, either, shown)


def _to_tensors(
    pixels: np.ndarray, digits: np.ndarray, kinds: np.ndarray, counted: np.ndarray,
    in_loss: np.ndarray, stream: tuple[int, ...],
) -> Batch:  # fmt: skip
    images, sounds = (np.flatnonzero(kinds == kind) for kind in (Kind.IMAGE, Kind.SOUND))
    shown = (kinds != _NOT_SHOWN).sum(axis=1)
    tokens = np.full((len(digits), SEQUENCE_LENGTH + 1), int(Token.PAD), dtype=np.int64)
    loss_mask = np.zeros((len(digits), SEQUENCE_LENGTH), dtype=np.float32)
    for count in np.unique(shown):
        rows, start = np.flatnonzero(shown == count), answer_start(count)
        tokens[rows, : start + count + 1] = _tokens(digits[rows, :count], kinds[rows, :count])
        loss_mask[rows, start - 1 : start - 1 + count] = in_loss[rows, :count]
    return Batch(
        input_ids=torch.from_numpy(tokens[:, :-1].copy()),
        labels=torch.from_numpy(tokens[:, 1:].copy()),
        loss_mask=torch.from_numpy(loss_mask),
        position_ids=torch.arange(SEQUENCE_LENGTH).expand(len(digits), -1).contiguous(),
        images=torch.from_numpy((pixels[images] / (MAX_PIXEL / 2) - 1.0)[:, None]).float(),
        image_slots=torch.from_numpy(images),
        clips=Clips(stream, digits.reshape(-1)[sounds], sounds),
        digits=torch.from_numpy(digits.copy()),
        kinds=torch.from_numpy(kinds),
        counted=torch.from_numpy(counted.copy()),
        lengths=tuple((answer_start(shown) + shown + 1).tolist()),
    )


def _tokens(digits: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """Tokens of samples that show equally many digits, from ``<bos>`` to ``<eos>``."""
    count = digits.shape[1]
    starts = np.array([Token.IMAGE_START, Token.SOUND_START, Token.TEXT_START])[kinds]
    names = int(Token.NAME) + digits
    shown = np.choose(kinds, [np.full_like(names, Token.IMAGE), int(Token.SOUND), names])
    slots = np.repeat(shown[:, :, None], 1 + TOKENS_PER_DIGIT, axis=2)
    slots[:, :, 0] = starts
    tokens = np.empty((len(digits), answer_start(count) + count + 1), dtype=np.int64)
    tokens[:, 0], tokens[:, -1] = Token.BOS, Token.EOS
    tokens[:, 1 : answer_start(count) - len(_QUESTION)] = slots.reshape(len(digits), -1)
    tokens[:, answer_start(count) - len(_QUESTION) : answer_start(count)] = _QUESTION
    tokens[:, answer_start(count) : -1] = digits + int(Token.ZERO)
    return tokens
