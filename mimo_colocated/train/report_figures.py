# SPDX-License-Identifier: Apache-2.0
"""The figures of a run's page, each as the text of an SVG that needs nothing else."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron.core.models.mimo.job.layout_plot import draw_layout
from megatron.core.models.mimo.job.plots import MUTED, RIGHT, WRONG, draw_series
from mimo_colocated.cli.drawing import bridge_of
from mimo_colocated.launch.layouts import LANGUAGE, Layout

Lines = Sequence[Mapping[str, Any]]
MOST_RANKS = 512
"""Larger layouts are not drawn."""
_COLOURS = (RIGHT, "#1a7f37", "#bc4c00", "#8250df")


def curves(lines: Lines) -> str:
    """Return loss, gradient norm and learning rate over the steps.

    Args:
        lines: of ``metrics.jsonl``.
    """
    figure = Figure(figsize=(9, 7), layout="constrained")
    panels = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1, 1))
    names = {"loss": "loss", "grad_norm": "grad norm", "learning_rate": "learning rate"}
    for axes, (name, said) in zip(panels, names.items(), strict=True):
        draw_series(axes, lines, name)
        axes.set_ylabel(said)
    panels[-1].set_xlabel("step")
    return _svg(figure)


def seconds(lines: Lines) -> str:
    """Return seconds of each step, with those that it waited for its data."""
    waited = _values(lines, "waited_s")
    rest = np.clip(_values(lines, "seconds") - waited, 0, None)
    parts = {"waiting for data": (waited, WRONG), "all else": (rest, RIGHT)}
    return _areas(lines, parts, "seconds per step")


def work(lines: Lines) -> str:
    """Return the FLOPs of each step by module, and what a homogeneous layout would repeat."""
    modules = list(lines[0].get("tflop", {})) if lines else []
    parts = {
        name: (np.array([line["tflop"][name] for line in lines]), _COLOURS[n % len(_COLOURS)])
        for n, name in enumerate(modules)
    }
    repeated = _values(lines, "tflop_repeated")
    if repeated.any():
        parts["a homogeneous layout would repeat"] = (repeated, MUTED)
    return _areas(lines, parts, "TFLOP per step")


def rate(lines: Lines) -> str:
    """Return TFLOP/s of a rank over the steps."""
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    axes = figure.subplots()
    draw_series(axes, lines, "tflops_per_rank")
    axes.set(xlabel="step", ylabel="TFLOP/s per rank")
    return _svg(figure)


def layout(layouts: Mapping[str, Layout], tokens: int, *, sequence_parallel: bool) -> str:
    """Return which rank holds what on either side of the bridges.

    Args:
        layouts: module -> its layout, at least one encoder among them.
        tokens: of a sample.
        sequence_parallel: the language model cuts its sequence over TP, too.
    """
    language = layouts[LANGUAGE]
    encoders = {name: at for name, at in layouts.items() if name != LANGUAGE}
    bridges = [
        bridge_of(name, at, language, "routed", sequence_parallel) for name, at in encoders.items()
    ]
    samples = math.lcm(*(at.dp for at in layouts.values()))
    pieces = 2 * language.cp * language.tp
    length = -(-tokens // pieces) * pieces
    return _svg(draw_layout(bridges, samples, length, sequence_parallel=sequence_parallel))


def _values(lines: Lines, name: str) -> np.ndarray:
    """One value of every line; 0 where a line has none."""
    return np.array([line.get(name) or 0.0 for line in lines], dtype=float)


def _areas(lines: Lines, parts: Mapping[str, tuple[np.ndarray, str]], said: str) -> str:
    figure = Figure(figsize=(9, 3), layout="constrained")
    axes = figure.subplots()
    _stack(axes, [line["step"] for line in lines], parts)
    axes.set(xlabel="step", ylabel=said)
    return _svg(figure)


def _stack(
    axes: Axes, steps: Sequence[int], parts: Mapping[str, tuple[np.ndarray, str]]
) -> None:
    """Areas above one another; each step is as wide as the others."""
    below = np.zeros(len(steps))
    for name, (values, colour) in parts.items():
        axes.fill_between(
            steps, below, below + values, label=name, color=colour, step="mid", lw=0
        )
        below = below + values
    if parts:
        axes.legend(fontsize=8, loc="upper right")
    axes.spines[["top", "right"]].set_visible(False)


def _svg(figure: Figure) -> str:
    """Without the document type and the metadata, which name addresses on the network."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", facecolor="white")
    svg = buffer.getvalue()
    return re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
