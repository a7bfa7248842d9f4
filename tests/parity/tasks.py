# SPDX-License-Identifier: Apache-2.0
"""The data of a row: reading digits, from images or from tokens that stand for them.

Batches are pure functions of (seed, step); every rank cuts its own part and none is copied.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from examples.mimo.digits.data import (
    DIGITS_PER_SAMPLE,
    TOKENS_PER_DIGIT,
    Batch,
    DigitsBatches,
    Token,
)
from tests.parity.rows import IMAGES, MASKS, Reference

SEED = 7


class MaskedBatches(DigitsBatches):
    """Batches whose loss masks are cut down to one sample's, or to nothing in the first step.

    One sample leaves most language replicas without a counted token. A step that counts nothing
    at all must leave the weights alone, and the steps after it must not notice.
    """

    def __init__(self, batch: int, masks: str) -> None:
        super().__init__(SEED, "train", batch)
        self._none_first = masks == "none"

    def batch(self, step: int) -> Batch:
        whole = super().batch(step)
        if self._none_first and step > 0:
            return whole
        mask = whole.loss_mask.clone()
        mask[0 if self._none_first else 1 :] = 0
        return replace(whole, loss_mask=mask)


class TextBatches(DigitsBatches):
    """The same samples with the image tokens replaced by tokens that name the digit."""

    def batch(self, step: int) -> Batch:
        whole = super().batch(step)
        everywhere = torch.ones(len(whole.digits), dtype=torch.bool)
        return replace(whole, input_ids=named(whole, everywhere)).images_of(0, 0)


class MixedBatches(DigitsBatches):
    """Batches of which only some samples have images; the others name their digits in tokens.

    ``"mixed"``: every other sample of some quarters of the batch has images, so that replicas and
    microbatches have none: of 4 microbatches the first and the last, in the next step those in the
    middle; of 2 the first in the third step, and the last in the fourth.
    ``"none"``: no sample has.
    """

    _QUARTERS = ((0, 1, 1, 0), (1, 0, 0, 1), (0, 0, 1, 1), (1, 1, 0, 0))

    def __init__(self, batch: int, images: str, **options: bool) -> None:
        super().__init__(SEED, "train", batch, **options)
        self._any = images != "none"

    def shown(self, step: int) -> torch.Tensor:
        """Which samples of a step have images, bool ``(batch,)``."""
        samples = torch.arange(self.global_batch_size)
        quarters = torch.tensor(self._QUARTERS[step % len(self._QUARTERS)], dtype=torch.bool)
        return quarters[4 * samples // len(samples)] & (samples % 2 == 1) & self._any

    def batch(self, step: int) -> Batch:
        whole, shown = super().batch(step), self.shown(step)
        kept = shown[whole.image_slots // DIGITS_PER_SAMPLE]
        return replace(
            whole,
            input_ids=named(whole, ~shown),
            images=whole.images[kept],
            image_slots=whole.image_slots[kept],
        )


def named(whole: Batch, samples: torch.Tensor) -> torch.Tensor:
    """``input_ids`` in which some samples' image tokens are replaced by tokens for the digits."""
    shown = int(Token.NAME) + whole.digits.repeat_interleave(TOKENS_PER_DIGIT, dim=1)
    there = (whole.kinds >= 0).repeat_interleave(TOKENS_PER_DIGIT, dim=1)
    input_ids = whole.input_ids.clone()
    places = (input_ids == int(Token.IMAGE)) & samples[:, None]
    input_ids[places] = shown[there & samples[:, None]]
    return input_ids


def batches(reference: Reference) -> DigitsBatches:
    """The data of a reference and of all rows that are compared with it."""
    assert reference.masks in MASKS, reference.masks
    assert reference.images in IMAGES, reference.images
    if reference.audio:
        assert reference.images == "all", reference.images
        assert reference.masks in ("uniform", "uneven"), reference.masks
        uneven = reference.masks == "uneven"
        options = {"uneven_loss_mask": uneven, "varied": reference.varied, "audio": True}
        return DigitsBatches(SEED, "train", reference.batch, **options)
    if reference.images != "all":
        assert reference.masks in ("uniform", "uneven"), reference.masks
        options = {"uneven_loss_mask": reference.masks == "uneven", "varied": reference.varied}
        return MixedBatches(reference.batch, reference.images, **options)
    if reference.masks in ("one_sample", "none"):
        return MaskedBatches(reference.batch, reference.masks)
    kind = TextBatches if reference.task == "text" else DigitsBatches
    uneven = reference.masks == "uneven"
    return kind(
        SEED, "train", reference.batch, uneven_loss_mask=uneven, varied=reference.varied
    )
