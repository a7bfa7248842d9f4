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
from matplotlib.ticker import MaxNLocator

from megatron.core.models.mimo.job.layout_plot import draw_layout
from megatron.core.models.mimo.job.plots import MUTED, RIGHT, WRONG, draw_series
from mimo_colocated.cli.drawing import bridge_of
from mimo_colocated.launch.layouts import LANGUAGE, Layout

Lines = Sequence[Mapping[str, Any]]
MOST_RANKS = 512
"""Larger layouts are not drawn."""
_OTHER = "#afb8c1"
PARTS = {
    "encoder": "#1a7f37",
    "bridge": "#bc4c00",
    "language": RIGHT,
    "gradients": "#8250df",
    "optimizer": "#57606a",
    "data": "#bf8700",
    "other": _OTHER,
}
"""Part of a step -> colour."""
_ENCODERS = (PARTS["encoder"], "#1b7c83", "#9a6700")


def curves(lines: Lines) -> str:
    """Return loss, gradient norm and learning rate over the steps, and the norm of each module.

    Args:
        lines: of ``metrics.jsonl``.
    """
    modules = _modules(lines, "grad_norms")
    names = {"loss": "loss", "grad_norm": "grad norm", "learning_rate": "learning rate"}
    figure = Figure(figsize=(9, 8 if modules else 7), layout="constrained")
    count = len(names) + bool(modules)
    panels = figure.subplots(count, 1, sharex=True, height_ratios=(3, *[1] * (count - 1)))
    for axes, (name, said) in zip(panels, names.items(), strict=False):
        draw_series(axes, lines, name)
        axes.set_ylabel(said)
    panels[2].set_yscale("linear")  # of a warm-up and a decay to 0
    for number, name in enumerate(modules):
        draw_series(
            panels[-1],
            _of_module(lines, "grad_norms", name),
            name,
            colour=_colour(name, number),
            label=name,
        )
    if modules:
        panels[-1].set_ylabel("grad norm\nby module")
        _legend(panels[-1])
    _steps(panels[-1])
    figure.align_ylabels()
    return _svg(figure)


def seconds(lines: Lines) -> str:
    """Return seconds of each step by part; of older runs those that it waited for its data."""
    names = times_of(lines)
    parts = {
        name: (np.array([line.get("times", {}).get(name, 0.0) for line in lines]), colour)
        for name, colour in PARTS.items()
        if name in names
    }
    if not parts:
        waited = _values(lines, "waited_s")
        rest = np.clip(_values(lines, "seconds") - waited, 0, None)
        parts = {"waiting for data": (waited, WRONG), "all else": (rest, RIGHT)}
    return _areas(lines, parts, "seconds per step")


def split(times: Mapping[str, float]) -> str:
    """Return one bar, a whole step, cut into its parts.

    Args:
        times: part -> seconds.
    """
    figure = Figure(figsize=(9, 1.5), layout="constrained")
    axes, at, whole = figure.subplots(), 0.0, sum(times.values())
    for name, colour in PARTS.items():
        part = times.get(name, 0.0) / max(whole, 1e-9)
        label = f"{name} {part:.0%}"
        axes.barh(0, part, left=at, color=colour, label=label, edgecolor="white", lw=0.5)
        if part > 0.012 * len(label):  # of what fits
            middle = at + part / 2
            axes.text(middle, 0, label, ha="center", va="center", color="white", fontsize=9)
        at += part
    axes.set(xlim=(0, 1), ylim=(-0.5, 0.5))
    axes.set_axis_off()
    figure.legend(loc="outside lower center", ncols=len(PARTS), fontsize=8, frameon=False)
    return _svg(figure)


def times_of(lines: Lines) -> dict[str, float]:
    """Return part -> mean seconds of a step, the first left out if there are more."""
    told = [line["times"] for line in lines if "times" in line]
    told = told[1:] or told
    names = {name: None for each in told for name in each}
    return {name: sum(each.get(name, 0.0) for each in told) / len(told) for name in names}


def spread(lines: Lines) -> str:
    """Return the work of the encoder replica with most over the mean, before and after."""
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    axes = figure.subplots()
    for number, name in enumerate(_modules(lines, "spread_before")):
        for key, colour in (("before", MUTED), ("after", _colour(name, number))):
            draw_series(
                axes,
                _of_module(lines, f"spread_{key}", name),
                name,
                colour=colour,
                label=f"{name}, {key} balancing",
            )
    low, high = axes.get_ylim()
    axes.set(ylabel="most work\nover mean work", ylim=(min(low, 0.98), max(high, 1.2)))
    _steps(axes)
    _legend(axes)
    return _svg(figure)


def work(lines: Lines) -> str:
    """Return the FLOPs of each step by module, and what a homogeneous layout would repeat."""
    modules = _modules(lines, "tflop")
    each = [_values(_of_module(lines, "tflop", name), name) for name in modules]
    repeated = _values(lines, "tflop_repeated")
    scale, unit = _unit(np.sum([*each, repeated], axis=0))
    parts = {
        name: (values * scale, _colour(name, number))
        for number, (name, values) in enumerate(zip(modules, each, strict=True))
    }
    if repeated.any():
        parts["a homogeneous layout would repeat"] = (repeated * scale, _OTHER)
    return _areas(lines, parts, f"{unit} per step")


def rate(lines: Lines) -> str:
    """Return FLOP/s of a rank over the steps."""
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    axes = figure.subplots()
    scale, unit = _unit(_values(lines, "tflops_per_rank"))
    rates = [{**line, "rate": line["tflops_per_rank"] * scale} for line in lines
             if line.get("tflops_per_rank") is not None]  # fmt: skip
    draw_series(axes, rates, "rate")
    axes.set_ylim(bottom=0 if axes.get_yscale() == "linear" else None)
    axes.set_ylabel(f"{unit}/s per rank")
    _steps(axes)
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


def _modules(lines: Lines, name: str) -> list[str]:
    """What has a value of its own, the language model last."""
    found = {module: None for line in lines for module in line.get(name) or {}}
    return sorted(found, key=lambda module: module == LANGUAGE)


def _of_module(lines: Lines, name: str, module: str) -> list[dict[str, Any]]:
    return [{"step": line["step"], module: (line.get(name) or {}).get(module)} for line in lines]


def _colour(module: str, number: int) -> str:
    return PARTS["language"] if module == LANGUAGE else _ENCODERS[number % len(_ENCODERS)]


def _steps(axes: Axes) -> None:
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _unit(tera: np.ndarray) -> tuple[float, str]:
    """What to multiply 1e12 FLOPs with, and what they are then: tiny models need less."""
    return (1.0, "TFLOP") if tera.max(initial=0.0) >= 0.1 else (1e3, "GFLOP")


def _legend(axes: Axes) -> None:
    """Above the axes, where it hides nothing."""
    axes.legend(
        fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=7, frameon=False,
        borderaxespad=0.2,
    )  # fmt: skip


def _values(lines: Lines, name: str) -> np.ndarray:
    """One value of every line; 0 where a line has none."""
    return np.array([line.get(name) or 0.0 for line in lines], dtype=float)


def _areas(lines: Lines, parts: Mapping[str, tuple[np.ndarray, str]], said: str) -> str:
    figure = Figure(figsize=(9, 3), layout="constrained")
    axes = figure.subplots()
    _stack(axes, [line["step"] for line in lines], parts)
    axes.set_ylabel(said)
    _steps(axes)
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
    _legend(axes)
    # A first step that waits for caches, or one that saved, leaves the others visible.
    usual = 1.5 * np.quantile(below, 0.9)
    if below.max() > usual:
        axes.set_ylim(0, usual)
        said = f"the highest is {below.max():.3g}"
        axes.text(1, 1.02, said, fontsize=8, ha="right", color=MUTED, transform=axes.transAxes)
    axes.margins(x=0)
    axes.spines[["top", "right"]].set_visible(False)


def _svg(figure: Figure) -> str:
    """Without the document type and the metadata, which name addresses on the network."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", facecolor="white")
    svg = buffer.getvalue()
    return re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
