# SPDX-License-Identifier: Apache-2.0
"""Handwritten digits as sequences of tokens: scikit-learn's 1,797 images of 8 x 8 pixels.

A pixel is a token, its grey value 0 to 16; a sample is the 64 pixels row by row, its class the
digit. Every fifth image is held out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from megatron.core.models.mimo.job.samples import shuffled

LENGTH, CLASSES, VOCABULARY = 64, 10, 32  # 17 tokens are used; 32 divide over any TP
_EVERY = 5


@dataclass(frozen=True)
class Digits:
    """Samples.

    Attributes:
        ids: ``(n, 64)`` int64.
        classes: ``(n,)`` int64.
    """

    ids: torch.Tensor
    classes: torch.Tensor

    def to(self, device: torch.device) -> Digits:
        """Return them on a device."""
        return Digits(self.ids.to(device), self.classes.to(device))

    def batch(self, step: int, size: int, seed: int, part: int, parts: int) -> Digits:
        """Return a replica's part of a step's batch: the same on all its TP ranks.

        Args:
            step: from 0.
            size: of the global batch.
            seed: of the order, which is another one in every epoch.
            part, parts: which replica, of how many; they divide the batch.
        """
        each = size // parts
        first = step * size + part * each
        chosen = shuffled(np.arange(first, first + each), len(self.classes), seed)
        return Digits(self.ids[chosen], self.classes[chosen])


def load() -> tuple[Digits, Digits]:
    """Return what is trained on, and what is held out."""
    from sklearn.datasets import load_digits

    found = load_digits()
    ids = torch.from_numpy(found.data.astype(np.int64))
    classes = torch.from_numpy(found.target.astype(np.int64))
    held_out = torch.arange(len(classes)) % _EVERY == 0
    return Digits(ids[~held_out], classes[~held_out]), Digits(ids[held_out], classes[held_out])
