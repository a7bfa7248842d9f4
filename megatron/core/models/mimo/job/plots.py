# SPDX-License-Identifier: Apache-2.0
"""Figures that are whole or not there, and ``loss.png``."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from mimo_colocated.launch.errors import write_atomically

INK, MUTED, RIGHT, WRONG = "#1b1f24", "#6e7781", "#0969da", "#cf222e"
"""Colours of text, of what matters less, of what is right and of what is wrong."""


def save_figure(figure: Figure, path: Path, what: str) -> None:
    """Write a figure, all of it or nothing: SVG if the path ends so, else PNG.

    Raises:
        JobError: for a full disk or a path that cannot be written.
    """
    buffer = io.BytesIO()
    kind = "svg" if path.suffix.lower() == ".svg" else "png"
    figure.savefig(buffer, format=kind, dpi=130, facecolor="white")
    write_atomically(path, buffer.getvalue(), what)


def plot_loss(
    path: Path, metrics: Sequence[Mapping[str, Any]], title: str, label: str = "loss"
) -> None:
    """Draw loss and gradient norm over the steps.

    Args:
        path: the PNG.
        metrics: lines of ``metrics.jsonl`` with ``step``, ``loss`` and ``grad_norm``.
        title: says which job it is.
        label: of the loss.
    """
    figure = Figure(figsize=(8, 5.2), layout="constrained")
    loss_axes, norm_axes = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for axes, name, said in (
        (loss_axes, "loss", label),
        (norm_axes, "grad_norm", "grad norm"),
    ):
        draw_series(axes, metrics, name)
        axes.set_ylabel(said)
    norm_axes.set_xlabel("step")
    figure.suptitle(title, fontsize=11)
    save_figure(figure, path, "the loss curve")


def draw_series(
    axes: Axes,
    metrics: Sequence[Mapping[str, Any]],
    name: str,
    *,
    colour: str = RIGHT,
    label: str = "",
) -> None:
    """Draw one value over the steps, in log scale where it spans a decade; a moving mean of many.

    Args:
        axes: to draw on.
        metrics: lines of ``metrics.jsonl`` with ``step``.
        name: of the value; lines without it are left out.
        colour: of the line.
        label: in the legend; empty for none.
    """
    points = [(line["step"], line[name]) for line in metrics if line.get(name) is not None]
    if points:
        steps, values = np.array(points).T
        smooth = len(values) >= 40
        (line,) = axes.plot(
            steps, values, color=colour, lw=0.8 if smooth else 1.6, alpha=0.35 if smooth else 1
        )
        if smooth:
            (line,) = axes.plot(steps, _moving_mean(values, 15), color=colour, lw=1.8)
        line.set_label(label)
        decades = np.log10(values.max() / values.min()) if values.min() > 0 else 0
        if decades >= 1:
            # Of less than a decade a log scale would have one label, or none.
            axes.set_yscale("log")
            if decades < 3:
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("")
    axes.grid(True, which="both", color="#d0d7de", lw=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def _moving_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Mean over the ``width`` values around each one, fewer at the ends."""
    kernel = np.ones(width)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")
