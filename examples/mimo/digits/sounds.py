# SPDX-License-Identifier: Apache-2.0
"""Spoken digits: real speech, one recording per digit, varied by us. numpy only.

The PyPI package ``captcha`` ships a recording of every digit (8 kHz, 8 bits, 0.2 to 0.35 s), all of
one voice. Each sound of a batch is one of these ten, played faster or slower (which moves its
pitch, too), louder or softer, at a time of its own, and with white noise. The draws are a pure
function of (seed, step, slot). So there are no new speakers to test on: held-out sounds are the
same ten recordings under other draws, and reading them right shows robustness to variation only.
"""

from __future__ import annotations

import functools
import importlib.util
import wave
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from examples.mimo.digits import INSTALL_HINT
from mimo_colocated.launch.errors import JobError

RATE = 8000  # samples per second, of the recordings and of all sounds
WINDOW, HOP = 512, 256  # samples
FRAMES, BANDS = 16, 20
SAMPLES = WINDOW + (FRAMES - 1) * HOP  # 0.54 s
FRAMES_PER_TOKEN = 4
TOKENS_PER_SOUND = FRAMES // FRAMES_PER_TOKEN

SPEED = (0.8, 1.25)
GAIN_DB = (-12.0, 0.0)
NOISE_DB = (-20.0, 0.0)  # of the recording's own power, as it is played
_MEL_HZ = (80.0, RATE / 2)
# The power in a band is seldom below the floor; log10 of it is brought to about -1..1.
_FLOOR, _MIDDLE, _SPAN = 1e-4, -1.2, 2.0


@functools.lru_cache(maxsize=1)
def recordings() -> tuple[np.ndarray, ...]:
    """Of the digits 0 to 9: float32 ``(n,)`` in -1..1.

    Raises:
        JobError: ``captcha`` is missing, or its recordings are not what they were.
    """
    package = importlib.util.find_spec("captcha")
    if package is None or not package.submodule_search_locations:
        raise JobError(f"the spoken digits come with captcha, which is missing; {INSTALL_HINT}")
    folder = Path(next(iter(package.submodule_search_locations))) / "data"
    return tuple(read_wav(folder / str(digit) / "default.wav") for digit in range(10))


def read_wav(path: Path) -> np.ndarray:
    """A recording, float32 ``(n,)`` in -1..1.

    Raises:
        JobError: the file cannot be read, or is not 8 kHz, mono, 8 bits, up to 0.43 s.
    """
    try:
        with wave.open(str(path)) as file:
            kind = (file.getframerate(), file.getnchannels(), 8 * file.getsampwidth())
            content = np.frombuffer(file.readframes(file.getnframes()), np.uint8)
    except (OSError, EOFError, wave.Error) as error:
        raise JobError(f"the recording {path} cannot be read ({error}); {INSTALL_HINT}") from error
    longest = int(SAMPLES * SPEED[0])
    if kind != (RATE, 1, 8) or not 0 < len(content) <= longest:
        raise JobError(
            f"the recording {path} has {kind[0]} Hz, {kind[1]} channels, {kind[2]} bits and "
            f"{len(content)} samples, but {RATE} Hz, 1 channel, 8 bits and 1 to {longest} samples "
            f"are needed; {INSTALL_HINT}"
        )
    return (content.astype(np.float32) - 128.0) / 128.0


@dataclass(frozen=True)
class Variation:
    """How one sound differs from its recording."""

    speed: float  # how much faster it is played
    gain_db: float  # loudness, of the recording's
    noise_db: float  # power of the white noise, of the recording's at that loudness
    place: float  # where it begins in the time that is left, 0..1

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Variation:
        """Speeds evenly in their logarithm, everything else evenly in its range."""
        low, high = np.log(SPEED)
        speed, gain = float(np.exp(rng.uniform(low, high))), float(rng.uniform(*GAIN_DB))
        return cls(speed, gain, float(rng.uniform(*NOISE_DB)), float(rng.uniform()))

    def apply(self, recording: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The sound, float32 ``(SAMPLES,)``; ``rng`` draws the noise."""
        length = round(len(recording) / self.speed)
        times = np.arange(length) * ((len(recording) - 1) / max(length - 1, 1))
        played = np.interp(times, np.arange(len(recording)), recording)
        played *= 10.0 ** (self.gain_db / 20.0)
        loudness = np.sqrt(np.mean(played**2)) * 10.0 ** (self.noise_db / 20.0)
        sound = loudness * rng.standard_normal(SAMPLES)
        start = round(self.place * (SAMPLES - length))
        sound[start : start + length] += played
        return sound.astype(np.float32)


@dataclass(frozen=True, eq=False)
class Clips:
    """Sounds that are made when they are asked for; each is a pure function of (stream, slot)."""

    stream: tuple[int, ...]  # seeds, such as (seed, step)
    digits: np.ndarray  # (n,), what is said
    slots: np.ndarray  # (n,), a number of its own for each in the stream

    def __len__(self) -> int:
        return len(self.slots)

    def between(self, start: int, stop: int) -> Clips:
        """Those whose slots are in ``start .. stop - 1``."""
        kept = (self.slots >= start) & (self.slots < stop)
        return Clips(self.stream, self.digits[kept], self.slots[kept])

    @functools.cached_property
    def waveforms(self) -> np.ndarray:
        """``(n, SAMPLES)`` float32."""
        made = np.empty((len(self), SAMPLES), dtype=np.float32)
        for row, digit, slot in zip(made, self.digits, self.slots, strict=True):
            rng = np.random.default_rng([*self.stream, int(slot)])
            row[:] = Variation.draw(rng).apply(recordings()[digit], rng)
        return made

    @functools.cached_property
    def spectra(self) -> np.ndarray:
        """What the encoder hears: :func:`log_mel` of the waveforms."""
        return log_mel(self.waveforms)


def log_mel(waveforms: np.ndarray) -> np.ndarray:
    """Logarithmic power in mel bands over time, float32 ``(n, FRAMES, BANDS)``, about -1..1.

    Raises:
        ValueError: for anything but ``(n, SAMPLES)``.
    """
    if waveforms.ndim != 2 or waveforms.shape[1] != SAMPLES:
        raise ValueError(
            f"sounds have the shape {waveforms.shape}, but (n, {SAMPLES}) is needed; cut or pad "
            "them first"
        )
    frames = np.lib.stride_tricks.sliding_window_view(waveforms, WINDOW, axis=1)[:, ::HOP]
    power = np.abs(np.fft.rfft(frames * np.hanning(WINDOW))) ** 2
    bands = np.log10(power @ _mel_filters().T + _FLOOR)
    return ((bands - _MIDDLE) / _SPAN).astype(np.float32)


def check_spectra(spectra: Any) -> None:
    """Refuse spectra that the encoder would misread.

    Raises:
        ValueError: for anything but ``(n, FRAMES, BANDS)``.
    """
    if spectra.ndim != 3 or tuple(spectra.shape[1:]) != (FRAMES, BANDS):
        raise ValueError(
            f"spectra have the shape {tuple(spectra.shape)}, but (n, {FRAMES}, {BANDS}) is "
            "needed; make them with sounds.log_mel"
        )


@functools.lru_cache(maxsize=1)
def _mel_filters() -> np.ndarray:
    """Triangles on the mel scale, ``(BANDS, WINDOW // 2 + 1)``, each of sum 1."""
    low, high = (2595.0 * np.log10(1.0 + hz / 700.0) for hz in _MEL_HZ)
    corners = 700.0 * (10.0 ** (np.linspace(low, high, BANDS + 2) / 2595.0) - 1.0)
    frequencies = np.fft.rfftfreq(WINDOW, 1.0 / RATE)
    rising = (frequencies - corners[:-2, None]) / (corners[1:-1] - corners[:-2])[:, None]
    falling = (corners[2:, None] - frequencies) / (corners[2:] - corners[1:-1])[:, None]
    triangles = np.clip(np.minimum(rising, falling), 0.0, None)
    return triangles / triangles.sum(axis=1, keepdims=True)
