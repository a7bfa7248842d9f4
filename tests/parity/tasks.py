# SPDX-License-Identifier: Apache-2.0
"""The data of a row: reading digits, from images or from tokens that stand for them.

Batches are pure functions of (seed, step); every rank cuts its own part and none is copied.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from data import (
    IMAGES_PER_SAMPLE,
    TOKENS_PER_IMAGE,
    Batch,
    DigitsBatches,
    Token,
    even_slice,
)

from tests.parity.rows import IMAGES, MASKS, Reference

SEED = 7
# Tokens that show a digit to a model without an encoder: digit d is one of these, not ZERO + d.
_SHOWN = 32


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
        return replace(whole, input_ids=named(whole, everywhere), images=torch.empty(0))


class MixedBatches(DigitsBatches):
    """Batches of which only some samples have images; the others name their digits in tokens.

    ``"mixed"``: every third sample has images, so some replicas and microbatches have none.
    ``"none"``: no sample has.
    """

    def __init__(self, batch: int, images: str, **options: bool) -> None:
        super().__init__(SEED, "train", batch, **options)
        self._shown = torch.arange(batch) % 3 == 1
        if images == "none":
            self._shown[:] = False

    def batch(self, step: int) -> Batch:
        """The global batch; its images are still those of all samples."""
        whole = super().batch(step)
        return replace(whole, input_ids=named(whole, ~self._shown))

    def local_batch(
        self, step: int, microbatch: int, num_microbatches: int, **ranks: int
    ) -> Batch:
        part = super().local_batch(step, microbatch, num_microbatches, **ranks)
        start, size = even_slice(
            self.global_batch_size, microbatch, num_microbatches, "batch", "microbatches"
        )
        first, count = even_slice(
            size, ranks["src_dp_rank"], ranks["src_dp"], "microbatch", "vision DP ranks"
        )
        kept = self._shown[start + first : start + first + count]
        of_images = kept.repeat_interleave(torch.tensor(part.image_counts))
        return replace(part, images=part.images[of_images])


def named(whole: Batch, samples: torch.Tensor) -> torch.Tensor:
    """``input_ids`` in which some samples' image tokens are replaced by tokens for the digits."""
    shown = _SHOWN + whole.digits.repeat_interleave(TOKENS_PER_IMAGE, dim=1)
    counts = torch.tensor(whole.image_counts)[:, None]
    there = (torch.arange(IMAGES_PER_SAMPLE) < counts).repeat_interleave(TOKENS_PER_IMAGE, dim=1)
    input_ids = whole.input_ids.clone()
    places = (input_ids == int(Token.IMAGE)) & samples[:, None]
    input_ids[places] = shown[there & samples[:, None]]
    return input_ids


def batches(reference: Reference) -> DigitsBatches:
    """The data of a reference and of all rows that are compared with it."""
    assert reference.masks in MASKS, reference.masks
    assert reference.images in IMAGES, reference.images
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
