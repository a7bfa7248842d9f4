# SPDX-License-Identifier: Apache-2.0
"""What is left of a run: tables, the stacked bars of the step, memory over a step."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.kinds import Kind
from campaigns.command import verdict

Cells = Sequence[Mapping[str, Any]]


def machine() -> dict[str, Any]:
    """What the figures were measured with."""
    from importlib.metadata import version

    return {
        "python": platform.python_version(),
        "torch": version("torch"),
        "megatron-core": version("megatron-core"),
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1),
    }


def text(value: Any) -> str:
    """A table's field: both directions with a bar between them, a dash for nothing.

    >>> text([49152.0, 0.5]), text(None), text(0.125)
    ('49,152 | 0.5', '-', '0.125')
    """
    if value is None:
        return "-"
    if isinstance(value, list):
        return " | ".join(text(each) for each in value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def table(kind: Kind, cells: Cells) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows of a kind's cells; verdicts last."""
    columns = {k: v for k, v in kind.load().COLUMNS.items() if k != "passed"}
    rows = [[*(text(cell.get(name)) for name in columns), verdict(cell)] for cell in cells]
    return [*columns.values(), ""], rows


def markdown(kind: Kind, cells: Cells) -> list[str]:
    """Return the same as lines of a Markdown table, without verdicts where nothing is judged."""
    headings, rows = table(kind, cells)
    width = len(headings) - all(cell["passed"] is None for cell in cells)
    # A bar ends a field of a Markdown table.
    lines = [[field.replace("|", "/") for field in row[:width]] for row in (headings, *rows)]
    text_lines = [f"| {' | '.join(line)} |" for line in lines]
    return [text_lines[0], "|---" * width + "|", *text_lines[1:]]


def source(command: str) -> str:
    """Return the command, and what it ran on."""
    at = machine()
    return (
        f"`{command}`, torch {at['torch']}, {at['cores']} cores, "
        f"load average at the end {at['load_average']}"
    )


def plot_steps(path: Path, cells: Cells) -> None:
    """Stacked bars: a step's sections, per layout and variant.

    Args:
        path: the PNG.
        cells: those of ``whole_step``.

    Raises:
        JobError: for a full disk or a path that cannot be written.
    """
    from matplotlib.figure import Figure

    from benchmarks.whole_step import SECTIONS
    from megatron.core.models.mimo.job.plots import save_figure

    groups = list(dict.fromkeys((cell["encoder"], cell["layout"]) for cell in cells))
    figure = Figure(figsize=(10, 1.0 + 0.95 * len(groups)), layout="constrained")
    axes = figure.subplots()
    labels, places = [], []
    for row, cell in enumerate(cells):
        place = row + 0.8 * groups.index((cell["encoder"], cell["layout"]))
        labels.append(f"encoder {cell['encoder']} · {cell['layout']} · {cell['variant']}")
        places.append(place)
        left = 0.0
        for number, (name, width) in enumerate(zip(SECTIONS, cell["sections_ms"], strict=True)):
            label = name if row == 0 else None
            axes.barh(place, width, left=left, color=f"C{number}", label=label, height=0.8)
            left += width
        axes.text(left, place, f"  {cell['ratio']:.2f}", va="center", fontsize=8)
    axes.set_yticks(places, labels, fontsize=7.5)
    axes.invert_yaxis()
    axes.margins(x=0.08)
    axes.set_xlabel("ms of a step (mean over ranks); at the bars' ends: step over homogeneous")
    figure.legend(loc="outside upper center", ncols=len(SECTIONS), fontsize=8, frameon=False)
    save_figure(figure, path, "the stacked bars")


def plot_memory(path: Path, cells: Cells) -> None:
    """Bytes allocated over a step of rank 0, a line per policy of the whole encoder.

    Args:
        path: the PNG.
        cells: those of ``memory_policies``; the first step of them is drawn.

    Raises:
        JobError: for a full disk or a path that cannot be written.
    """
    from matplotlib.figure import Figure

    from megatron.core.models.mimo.job.plots import save_figure

    first = [c for c in cells if (c["layout"], c["step"]) == (cells[0]["layout"], cells[0]["step"])]
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots()
    for cell in first:
        if cell["encoder"] == cell["projector"] and cell.get("curve"):
            times, sizes = zip(*cell["curve"], strict=True)
            share = [100 * time / times[-1] for time in times]
            axes.step(share, [size / 2**20 for size in sizes], where="post", label=cell["encoder"])
    axes.set_xlabel("% of the step's time")
    axes.set_ylabel("MiB allocated on the device")
    axes.set_title(f"encoder and projector; {cells[0]['layout']}, {cells[0]['step']}", fontsize=9)
    axes.legend(frameon=False)
    save_figure(figure, path, "memory over the step")
