# SPDX-License-Identifier: Apache-2.0
"""What a model read of the held-out digits, and ``predictions.png``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from examples.mimo.digits.data import DIGITS_PER_SAMPLE, Batch, DigitsBatches, Kind
from examples.mimo.digits.images import IMAGE_SIDE
from examples.mimo.digits.sounds import SAMPLES, log_mel
from megatron.core.models.mimo.job.plots import INK, MUTED, RIGHT, WRONG, save_figure

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


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


def plot_predictions(
    path: Path,
    images: np.ndarray,
    truth: np.ndarray,
    read: np.ndarray,
    counted: np.ndarray | None = None,
    *,
    waveforms: np.ndarray | None = None,
    by_kind: Mapping[str, float] | None = None,
    show: int = 30,
) -> float:
    """Draw held-out samples with what the model read, wrong digits in red; wrong samples first.

    Digits that are shown as text are drawn as their name. Arrays are those of :class:`HeldOut`.

    Args:
        path: the PNG.
        images, waveforms, truth, read: what was shown, what it is, and what the model read.
        counted: all by default; the accuracy is over these.
        by_kind: shares read right of some kinds of digits, for the title.
        show: samples to draw at most; those without a mistake are taken from all over.

    Returns:
        The share of counted digits that were read right.
    """
    counted = np.ones_like(truth, dtype=bool) if counted is None else counted
    wrong = (read != truth) & counted
    accuracy = 1.0 - wrong.sum() / counted.sum()
    order = _choose(wrong.any(axis=1), show)
    columns = min(5, len(order))
    rows = -(-len(order) // columns)
    figure = Figure(figsize=(2.3 * columns, 0.92 * rows + 0.9), layout="constrained")
    kinds = ", ".join(f"{share:.1%} of the {kind}" for kind, share in (by_kind or {}).items())
    title = (
        f"{accuracy:.1%} of {counted.sum()} held-out digits read right"
        f"{f' ({kinds})' if kinds else ''}\n{len(order)} of {len(truth)} samples, those with a "
        "mistake first (red: what was read, above: what it is)"
    )
    figure.suptitle(title, fontsize=10)
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.axis("off")
    for axes, sample in zip(figure.axes, order, strict=False):
        sounds = None if waveforms is None else waveforms[sample]
        _draw_sample(axes, images[sample], sounds, truth[sample], read[sample], wrong[sample])
    save_figure(figure, path, "the predictions")
    return float(accuracy)


def _choose(wrong: np.ndarray, show: int) -> np.ndarray:
    """Up to ``show`` samples: those with a mistake, then some of the others, evenly apart."""
    first, right = np.flatnonzero(wrong)[:show], np.flatnonzero(~wrong)
    places = np.linspace(0, len(right) - 1, min(show - len(first), len(right)))
    return np.concatenate([first, right[places.round().astype(int)]])


def _draw_sample(
    axes: Axes, images: np.ndarray, sounds: np.ndarray | None,
    truth: np.ndarray, read: np.ndarray, wrong: np.ndarray,
) -> None:  # fmt: skip
    """One strip of four digits, what was read below each, framed in red if it is wrong."""
    gap, side = 1, images.shape[-1]
    for index, image in enumerate(images):
        left = index * (side + gap)
        if np.isfinite(image).all():
            axes.imshow(image, extent=_box(left, side), cmap="gray_r", interpolation="nearest")
        elif sounds is not None and np.isfinite(sounds[index]).all():
            _draw_sound(axes, sounds[index], left, side)
        else:
            _draw_name(axes, NAMES[truth[index]], left, side)
        digit = "?" if read[index] < 0 else str(read[index])
        style: dict[str, Any] = {"ha": "center", "fontsize": 11, "fontfamily": "monospace"}
        center = left + (side - 1) / 2
        color = WRONG if wrong[index] else INK
        axes.text(center, side + 1.6, digit, va="center", color=color, weight="bold", **style)
        if wrong[index]:
            axes.text(center, -1.9, str(truth[index]), va="center", color=MUTED, **style)
            frame = Rectangle((left - 0.5, -0.5), side, side, fill=False, ec=WRONG, lw=2)
            axes.add_patch(frame)
    width = 4 * side + 3 * gap
    panel = Rectangle((-2.5, -3.6), width + 4, side + 7, fc="#eef1f4", ec="none", zorder=-1)
    axes.add_patch(panel)
    axes.set_xlim(-3.5, width + 2.5)
    axes.set_ylim(side + 4, -4.2)


def _box(left: float, side: int) -> tuple[float, float, float, float]:
    """Where ``imshow`` draws a square of ``side`` whose first pixel is at (left, 0)."""
    return left - 0.5, left + side - 0.5, side - 0.5, -0.5


def _draw_sound(axes: Axes, sound: np.ndarray, left: float, side: int) -> None:
    """The waveform in the upper third, the spectrogram that the encoder hears below it."""
    right, low = left + side - 0.5, side / 3 - 0.5
    spectrum = log_mel(sound[None].astype(np.float32))[0].T[::-1]
    extent = (left - 0.5, right, side - 0.5, low)
    axes.imshow(spectrum, extent=extent, cmap="magma", aspect="auto", interpolation="nearest")
    times = np.linspace(left - 0.5, right, len(sound))
    height = (low + 0.3) / max(float(np.abs(sound).max()), 1e-9) / 2
    axes.plot(times, low / 2 - 0.3 + height * sound, color=RIGHT, lw=0.35)


def _draw_name(axes: Axes, name: str, left: float, side: int) -> None:
    """A digit that comes as text."""
    box = Rectangle((left - 0.5, -0.5), side, side, fc="white", ec="#d0d7de", lw=0.8)
    axes.add_patch(box)
    center = (left + (side - 1) / 2, (side - 1) / 2)
    axes.text(*center, name, ha="center", va="center", fontsize=7.5, color=MUTED)
