# SPDX-License-Identifier: Apache-2.0
"""Pictures of a study: accuracy by rate with intervals, and losses by step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from megatron.core.models.mimo.job.plots import MUTED, save_figure
from studies.lossy.grid import NOWHERE, RESENT
from studies.lossy.results import Setting

_COLORS = {"forward": "#0969da", "backward": "#bc4c00", "gradients": "#1a7f37"}
_LINES = {1: "-", 4: "--", 16: ":"}
_MARKS = {"zero": "o", "stale": "s", "rescaled": "^"}
_SMOOTH = 5  # steps


def accuracies(path: Path, found: Sequence[Setting]) -> None:
    """Draw held-out accuracy against the rate; the band is the interval of the lossless runs.

    Args:
        path: of the picture.
        found: settings; those of a model and a TP size share a panel.
    """
    figure, panels = _panels(found)
    for axes, here in panels:
        rates = sorted({each.cell.rate for each in here if each.cell.where != NOWHERE})
        for each in here:
            if each.cell.where == NOWHERE:
                half = each.accuracy.half or 0.0
                axes.axhspan(each.accuracy.mean - half, each.accuracy.mean + half, color="#eef1f4")
                axes.axhline(each.accuracy.mean, color=MUTED, lw=1, label="nothing lost")
        kinds = dict.fromkeys(_kind(each) for each in here if _is_drawn(each))
        for number, kind in enumerate(kinds):
            mine = [each for each in here if _is_drawn(each) and _kind(each) == kind]
            # Beside each other where rates are the same.
            x = [rates.index(e.cell.rate) + 0.06 * (number - len(kinds) / 2) for e in mine]
            where, burst, replacement = kind
            axes.errorbar(
                x,
                [each.accuracy.mean for each in mine],
                [each.accuracy.half or 0.0 for each in mine],
                color=_COLORS[where],
                ls=_LINES[burst],
                marker=_MARKS[replacement],
                ms=4,
                capsize=2,
                lw=1,
                label=f"{where}, {_burst(burst)}, {replacement}",
            )
        axes.set_xticks(range(len(rates)), [f"{rate:.0%}" for rate in rates])
        axes.set_xlabel("mean loss of packets")
    _finish(figure, panels, path, "held-out accuracy")


def curves(path: Path, found: Sequence[Setting]) -> None:
    """Draw the mean training loss of the lossless runs and of those that lose most, by step.

    Args:
        path: of the picture.
        found: settings; those that put zeros in the place of what is lost are drawn.
    """
    figure, panels = _panels(found)
    for axes, here in panels:
        most = max((each.cell.rate for each in here), default=0.0)
        for each in here:
            cell = each.cell
            if cell.where == NOWHERE:
                style: dict[str, Any] = {"color": MUTED, "label": "nothing lost"}
            elif cell.replacement == "zero" and cell.rate == most:
                label = f"{cell.where} {cell.rate:.0%}, {_burst(cell.burst)}"
                style = {"color": _COLORS[cell.where], "ls": _LINES[cell.burst], "label": label}
            else:
                continue
            window = np.ones(_SMOOTH) / _SMOOTH
            smooth = np.convolve(each.curve, window, "valid")
            axes.plot(np.arange(len(smooth)) + _SMOOTH, smooth, lw=1.2, **style)
        axes.set_xlabel("step")
    _finish(figure, panels, path, f"training loss, mean of {_SMOOTH} steps")


def _panels(found: Sequence[Setting]) -> tuple[Figure, list[tuple[Any, list[Setting]]]]:
    keys = list(dict.fromkeys((each.cell.subject, each.cell.tp) for each in found))
    figure = Figure(figsize=(1.0 + 4.6 * len(keys), 4.2), layout="constrained")
    made = figure.subplots(1, len(keys), squeeze=False)[0]
    panels = []
    for axes, (subject, tp) in zip(made, keys, strict=True):
        axes.set_title(f"{subject}, TP {tp}", fontsize=10)
        panels.append((axes, [e for e in found if (e.cell.subject, e.cell.tp) == (subject, tp)]))
    return figure, panels


def _finish(figure: Figure, panels: Sequence[tuple[Any, Any]], path: Path, said: str) -> None:
    panels[0][0].set_ylabel(said)
    for axes, _ in panels:
        axes.legend(fontsize=7, frameon=False)
    save_figure(figure, path, "a picture of the study")


def _is_drawn(each: Setting) -> bool:
    return each.cell.where != NOWHERE and each.cell.replacement != RESENT


def _kind(each: Setting) -> tuple[str, int, str]:
    return each.cell.where, each.cell.burst, each.cell.replacement


def _burst(burst: int) -> str:
    return "each by itself" if burst == 1 else f"bursts of {burst}"
