# SPDX-License-Identifier: Apache-2.0
"""The data of a row: reading digits, from images or from tokens that stand for them.

Batches are pure functions of (seed, step); every rank cuts its own part and none is copied.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from data import TOKENS_PER_IMAGE, Batch, DigitsBatches, Token

from tests.parity.rows import MASKS, Reference

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
        shown = _SHOWN + whole.digits.repeat_interleave(TOKENS_PER_IMAGE, dim=1)
        input_ids = whole.input_ids.clone()
        places = input_ids == int(Token.IMAGE)
        input_ids[places] = shown.flatten()
        return replace(whole, input_ids=input_ids, images=torch.empty(0))


def batches(reference: Reference) -> DigitsBatches:
    """The data of a reference and of all rows that are compared with it."""
    assert reference.masks in MASKS, reference.masks
    if reference.masks in ("one_sample", "none"):
        return MaskedBatches(reference.batch, reference.masks)
    kind = TextBatches if reference.task == "text" else DigitsBatches
    return kind(SEED, "train", reference.batch, uneven_loss_mask=reference.masks == "uneven")
