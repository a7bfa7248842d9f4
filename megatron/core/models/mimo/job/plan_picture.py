# SPDX-License-Identifier: Apache-2.0
"""A picture of estimates: bars of a step's time and of a rank's memory, part by part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron.core.models.mimo.job.plots import INK, MUTED, WRONG, save_figure
from megatron.core.models.mimo.plan.estimates import Estimate

_COLORS = (
    "#0969da", "#54aeff", "#1a7f37", "#8250df", "#bf3989",
    "#bc4c00", "#9a6700", "#57606a", "#afb8c1", "#6f42c1",
)  # fmt: skip


def plot_estimates(path: Path, estimates: Sequence[Estimate], title: str) -> None:
    """Draw a bar per estimate: milliseconds left, gigabytes right.

    Args:
        path: the picture, PNG or SVG by its suffix.
        estimates: from the top down, one or more.
        title: of the whole.
    """
    figure = Figure(figsize=(15, 1.8 + 0.5 * len(estimates)), layout="constrained")
    time, memory = figure.subplots(1, 2, sharey=True)
    _bars(time, [_scaled(each.seconds, 1000) for each in estimates])
    _bars(memory, [_scaled(each.memory, 1e-9) for each in estimates])
    time.set_xlabel("milliseconds of a step")
    memory.set_xlabel("gigabytes of the fullest rank")
    memory.axvline(estimates[0].capacity / 1e9, color=WRONG, lw=1)
    time.set_yticks(range(len(estimates)), [_label(each) for each in estimates], fontsize=8)
    time.invert_yaxis()
    figure.suptitle(title, fontsize=12, color=INK)
    save_figure(figure, path, "the picture of estimates")


def _label(each: Estimate) -> str:
    """Layouts, a homogeneous one by that word."""
    said = str(each.candidate)
    return f"homogeneous {said}" if each.candidate.homogeneous else said


def _scaled(parts: Any, factor: float) -> dict[str, float]:
    # A homogeneous encoder that runs while its stage waits makes the bubble less than nothing.
    return {name: max(0.0, value) * factor for name, value in vars(parts).items()}


def _bars(axes: Axes, rows: Sequence[Mapping[str, float]]) -> None:
    left = [0.0] * len(rows)
    # One color each: with more parts than colors this is an error.
    for color, name in zip(_COLORS[: len(rows[0])], rows[0], strict=True):
        widths = [row[name] for row in rows]
        axes.barh(range(len(rows)), widths, left=left, color=color, label=name, height=0.7)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for row, total in enumerate(left):
        axes.text(total, row, f" {total:.0f}", va="center", fontsize=8, color=MUTED)
    axes.margins(x=0.1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, ncols=5, loc="lower right", bbox_to_anchor=(1.0, 1.0))
