# SPDX-License-Identifier: Apache-2.0
"""``loss.png`` and ``predictions.png``."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from sounds import log_mel

from mimo_colocated.launch.errors import write_atomically

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
INK, MUTED, RIGHT, WRONG = "#1b1f24", "#6e7781", "#0969da", "#cf222e"


def save_figure(figure: Figure, path: Path, what: str) -> None:
    """Write a figure as PNG, all of it or nothing.

    Raises:
        JobError: for a full disk or a path that cannot be written.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, facecolor="white")
    write_atomically(path, buffer.getvalue(), what)


def plot_loss(path: Path, metrics: Sequence[Mapping[str, Any]], title: str) -> None:
    """Draw loss (log scale) and gradient norm over the steps.

    Args:
        path: the PNG.
        metrics: lines of ``metrics.jsonl`` with ``step``, ``loss`` and ``grad_norm``.
        title: says which run it is.
    """
    figure = Figure(figsize=(8, 5.2), layout="constrained")
    loss_axes, norm_axes = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for axes, name, label in (
        (loss_axes, "loss", "loss per answer digit"),
        (norm_axes, "grad_norm", "grad norm"),
    ):
        _draw_series(axes, metrics, name)
        axes.set_ylabel(label)
    norm_axes.set_xlabel("step")
    figure.suptitle(title, fontsize=11)
    save_figure(figure, path, "the loss curve")


def _draw_series(axes: Axes, metrics: Sequence[Mapping[str, Any]], name: str) -> None:
    points = [(line["step"], line[name]) for line in metrics if line.get(name) is not None]
    if points:
        steps, values = np.array(points).T
        smooth = len(values) >= 40
        axes.plot(
            steps, values, color=RIGHT, lw=0.8 if smooth else 1.6, alpha=0.35 if smooth else 1
        )
        if smooth:
            axes.plot(steps, _moving_mean(values, 15), color=RIGHT, lw=1.8)
        if values.min() > 0:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("")
    axes.grid(True, which="both", color="#d0d7de", lw=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def _moving_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Mean over the ``width`` values around each one, fewer at the ends."""
    kernel = np.ones(width)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")


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

    Digits that are shown as text are drawn as their name.

    Args:
        path: the PNG.
        images: ``(n, 4, 8, 8)``; not finite where a digit is shown otherwise.
        truth: ``(n, 4)``, the digits shown.
        read: ``(n, 4)``, the digits that the model read; -1 where it gave no digit.
        counted: ``(n, 4)`` bool, all by default; the accuracy is over these.
        waveforms: ``(n, 4, samples)``, the same for sounds; none by default.
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
    figure.suptitle(
        f"{accuracy:.1%} of {counted.sum()} held-out digits read right"
        f"{f' ({kinds})' if kinds else ''}\n"
        f"{len(order)} of {len(truth)} samples, those with a mistake first "
        "(red: what was read, above: what it is)",
        fontsize=10,
    )
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
    axes: Axes,
    images: np.ndarray,
    sounds: np.ndarray | None,
    truth: np.ndarray,
    read: np.ndarray,
    wrong: np.ndarray,
) -> None:
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
