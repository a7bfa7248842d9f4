# SPDX-License-Identifier: Apache-2.0
"""What a model read of the held-out digits, with what it was shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from data import DIGITS_PER_SAMPLE, Batch, DigitsBatches, Kind
from images import IMAGE_SIDE
from sounds import SAMPLES


@dataclass(frozen=True)
class HeldOut:
    """All held-out samples; ``n`` of them.

    Attributes:
        images: ``(n, 4, 8, 8)``, NaN where a digit is not shown as an image.
        waveforms: ``(n, 4, samples)``, NaN where it is not shown as a sound; None without audio.
        kinds: ``(n, 4)``, how digits are shown (:class:`data.Kind`).
        truth, read: ``(n, 4)``, the digits; -1 where the model gave none.
        counted: ``(n, 4)`` bool. Digits shown as text are not: the model only has to copy them.
    """

    images: np.ndarray
    waveforms: np.ndarray | None
    kinds: np.ndarray
    truth: np.ndarray
    read: np.ndarray
    counted: np.ndarray

    @classmethod
    def collect(cls, batches: DigitsBatches, answers: Sequence[torch.Tensor]) -> HeldOut:
        """From the held-out batches and what the model answered to each, ``(B, 4)``."""
        shown = list(batches)
        kinds = np.concatenate([batch.kinds.numpy() for batch in shown])
        counted = np.concatenate([batch.counted.numpy() for batch in shown])
        return cls(
            images=np.concatenate([_images(batch) for batch in shown]),
            waveforms=np.concatenate(list(map(_waveforms, shown))) if batches.audio else None,
            kinds=kinds,
            truth=np.concatenate([batch.digits.numpy() for batch in shown]),
            read=torch.cat(list(answers)).numpy(),
            counted=counted & (kinds != Kind.TEXT),
        )

    def accuracies(self) -> dict[str, float]:
        """The share of counted digits that were read right, by kind."""
        right = self.read == self.truth
        of = {kind: self.counted & (self.kinds == kind) for kind in (Kind.IMAGE, Kind.SOUND)}
        names = {Kind.IMAGE: "images", Kind.SOUND: "sounds"}
        return {names[kind]: float(right[which].mean()) for kind, which in of.items()}


def _images(batch: Batch) -> np.ndarray:
    places = np.full((batch.digits.numel(), IMAGE_SIDE, IMAGE_SIDE), np.nan, dtype=np.float32)
    places[batch.image_slots.numpy()] = batch.images[:, 0].numpy()
    return places.reshape(-1, DIGITS_PER_SAMPLE, IMAGE_SIDE, IMAGE_SIDE)


def _waveforms(batch: Batch) -> np.ndarray:
    places = np.full((batch.digits.numel(), SAMPLES), np.nan, dtype=np.float32)
    places[batch.clips.slots] = batch.clips.waveforms
    return places.reshape(-1, DIGITS_PER_SAMPLE, SAMPLES)
