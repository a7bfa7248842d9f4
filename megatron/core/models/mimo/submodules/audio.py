# SPDX-License-Identifier: Apache-2.0
"""The audio modality."""

from __future__ import annotations

from megatron.core.models.mimo.submodules.base import OneProjectionEach


class AudioModalitySubmodules(OneProjectionEach):
    """Encoders for audio data with at most one projection into, and one out of, language space.

    Arguments and errors are those of its base classes.
    """

    data = "audio"
