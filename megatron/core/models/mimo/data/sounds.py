# SPDX-License-Identifier: Apache-2.0
"""Sounds opened as a model's processor takes them: one channel, at its rate.

WAV files of whole numbers are read by Python itself, all others by the package soundfile where it
is installed. Another rate is converted by scipy.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import math
import wave
from typing import Any

import numpy as np

from megatron.core.models.mimo.data.conversation import AnyItem, SampleError

_INSTALL = "pip install 'megatron-mimo-colocated[audio]'"
_READERS = {
    1: lambda raw: (np.frombuffer(raw, np.uint8).astype(np.float32) - 128) / 2**7,
    2: lambda raw: np.frombuffer(raw, "<i2").astype(np.float32) / 2**15,
    3: lambda raw: _of_three_bytes(raw).astype(np.float32) / 2**31,
    4: lambda raw: np.frombuffer(raw, "<i4").astype(np.float32) / 2**31,
}
"""Bytes of a number in a WAV file -> its numbers, -1 to 1."""


def length_of(item: AnyItem, rate: int) -> int:
    """Return how many numbers a sound has at a rate, by its header.

    Args:
        item: the sound.
        rate: numbers per second.

    Raises:
        SampleError: ``unreadable``.
    """
    frames, own = _opened(item, header_only=True)
    return -(-frames * rate // own)


def read_sound(item: AnyItem, rate: int) -> np.ndarray:
    """Return a sound, float32 ``(n,)``: the mean of its channels.

    Args:
        item: the sound.
        rate: numbers per second.

    Raises:
        SampleError: ``unreadable``.
    """
    channels, own = _opened(item, header_only=False)
    mono = channels.mean(axis=1)
    if own == rate:
        return mono
    try:
        from scipy.signal import resample_poly
    except ImportError as error:
        raise SampleError(
            "unreadable",
            f"{item.name} has {own} numbers per second, its processor takes {rate}; to convert it "
            f"install scipy: {_INSTALL}",
        ) from error
    common = math.gcd(own, rate)
    return resample_poly(mono, rate // common, own // common).astype(np.float32)


def look_at(item: AnyItem) -> None:
    """Read a sound to its end.

    Args:
        item: the sound.

    Raises:
        SampleError: ``unreadable``.
    """
    _opened(item, header_only=False)


def _opened(item: AnyItem, *, header_only: bool) -> tuple[Any, int]:
    """(frames or float32 ``(frames, channels)``, numbers per second)."""
    content = item.read()
    there = importlib.util.find_spec("soundfile") is not None
    try:
        return (_any_kind if there else _wav)(content, header_only=header_only)
    except MemoryError:
        raise
    except Exception as error:  # libraries raise many kinds for broken files
        hint = "" if there else f"; other kinds than WAV need soundfile: {_INSTALL}"
        said = str(error) or type(error).__name__
        raise SampleError("unreadable", f"{item.name} is no sound: {said}{hint}") from error


def _any_kind(content: bytes, *, header_only: bool) -> tuple[Any, int]:
    soundfile = importlib.import_module("soundfile")
    if header_only:
        known = soundfile.info(io.BytesIO(content))
        return known.frames, known.samplerate
    return soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)


def _wav(content: bytes, *, header_only: bool) -> tuple[Any, int]:
    with wave.open(io.BytesIO(content)) as file:
        frames, rate = file.getnframes(), file.getframerate()
        if header_only:
            return frames, rate
        width, channels = file.getsampwidth(), file.getnchannels()
        raw = file.readframes(frames)
    if len(raw) != frames * width * channels:
        raise ValueError(f"it ends after {len(raw)} of {frames * width * channels} bytes")
    return _READERS[width](raw).reshape(-1, channels), rate


def _of_three_bytes(raw: bytes) -> np.ndarray:
    wide = np.zeros((len(raw) // 3, 4), dtype=np.uint8)
    wide[:, 1:] = np.frombuffer(raw, np.uint8).reshape(-1, 3)
    return wide.view("<i4").ravel()
