# SPDX-License-Identifier: Apache-2.0
"""The image modality."""

from __future__ import annotations

from megatron.core.models.mimo.submodules.base import OneProjectionEach


class VisionModalitySubmodules(OneProjectionEach):
    """Encoders for image data with at most one projection into, and one out of, language space.

    Arguments and errors are those of its base classes.
    """

    data = "image"
