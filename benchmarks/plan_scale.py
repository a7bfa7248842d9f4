# SPDX-License-Identifier: Apache-2.0
"""Predicted steps from 8 to 16,384 GPUs: ``python -m benchmarks.plan_scale [--picture FILE]``.

The model of the published headline, 1B + 7B at 64K tokens with 75 % of them images, on H100, with
one sample for eight GPUs at every size: what a GPU has to do stays the same, so what grows is what
collectives and their beginnings take. Both lines are the planner's first choices.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.published import ROWS
from megatron.core.models.mimo.plan.candidates import Search
from megatron.core.models.mimo.plan.estimates import Plan, plan
from megatron.core.models.mimo.plan.machine import PRESETS

SIZES = (8, 32, 128, 512, 2048, 8192, 16_384)
_HEADLINE = ROWS[1]
_GPUS_PER_SAMPLE = 8


def plans(sizes: Sequence[int]) -> Iterator[tuple[int, Plan, float]]:
    """Yield each size with its plan and the CPU seconds that planning took."""
    machine = PRESETS["h100"]
    for ranks in sizes:
        began = time.process_time()
        work = replace(_HEADLINE.work, samples=max(1, ranks // _GPUS_PER_SAMPLE))
        found = plan(_HEADLINE.shapes, work, machine, Search(ranks, machine.node))
        yield ranks, found, time.process_time() - began


def table(found: Sequence[tuple[int, Plan, float]]) -> str:
    """Return the sizes in markdown."""
    lines = [
        "| GPUs | colocated ms | layouts | homogeneous ms | layouts | gain | planned in CPU s |",
        "|---|---|---|---|---|---|---|",
    ]
    for ranks, each, seconds in found:
        cells = [str(ranks)]
        for best in (each.colocated[:1], each.homogeneous[:1]):
            shown = [(f"{1000 * one.seconds.total:.0f}", f"`{one.candidate}`") for one in best]
            cells += shown[0] if shown else ("-", "nothing fits")
        gain = "-" if each.gain is None else f"{100 * each.gain:.1f} %"
        lines.append("| " + " | ".join([*cells, gain, f"{seconds:.1f}"]) + " |")
    return "\n".join(lines)


def draw(path: Path, found: Sequence[tuple[int, Plan, float]]) -> None:
    """Draw both lines."""
    from matplotlib.figure import Figure

    from megatron.core.models.mimo.job.plots import save_figure

    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, color in (("colocated", "#0969da"), ("homogeneous", "#bc4c00")):
        points = _points(found, name)
        axes.plot(*zip(*points, strict=True), "o-", color=color, label=name)
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("GPUs (H100), one sample of 64K tokens for eight of them")
    axes.set_ylabel("predicted seconds of a step")
    axes.grid(True, color="#d0d7de", lw=0.5)
    axes.legend()
    save_figure(figure, path, "the picture of sizes")


def _points(found: Sequence[tuple[int, Plan, float]], name: str) -> list[tuple[int, float]]:
    every: list[Any] = [(ranks, getattr(each, name)) for ranks, each, _ in found]
    return [(ranks, best[0].seconds.total) for ranks, best in every if best]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, draw the picture; 1 if a size took more than ten seconds."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan_scale", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--picture", type=Path, help="file for the picture")
    options = parser.parse_args(argv)
    found = list(plans(SIZES))
    print(table(found))
    if options.picture:
        draw(options.picture, found)
    return int(any(seconds > 10 for _, _, seconds in found))


if __name__ == "__main__":
    sys.exit(main())
