# SPDX-License-Identifier: Apache-2.0
"""``layout.png``: which rank holds which samples and sequence chunks on either side of a bridge.

Everything is read off the :class:`BridgeLayout` or :class:`RouteLayout` that the bridge executes
and the sequence order that the model shards by; nothing is worked out here a second time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from megatron.core.models.mimo.comm.plan.gather_layout import BridgeDirection, BridgeLayout
from megatron.core.models.mimo.comm.plan.routed_layout import ExchangeGroup, RouteLayout
from megatron.core.models.mimo.comm.plan.routes import GroupRoutes
from megatron.core.models.mimo.comm.plan.token_runs import TokenRuns, rows_of_parts
from megatron.core.models.mimo.job.plots import INK, MUTED, save_figure
from megatron.core.models.mimo.partition.sequence_order import dense_positions

_MAX_ROWS, _MAX_CELLS = 32, 8
_LEFT, _RIGHT, _STRIP, _ROW = 0.0, 12.5, 6.4, 1.0  # in units of the drawing: a row is 1 high
_EMPTY, _EDGE = "#f3f5f7", "#d0d7de"
_GROUP_COLORS = (
    "#0969da",
    "#bc4c00",
    "#1a7f37",
    "#8250df",
    "#bf3989",
    "#9a6700",
    "#57606a",
    "#0b7285",
)


@dataclass(frozen=True)
class LayoutPlot:
    """What is drawn.

    Attributes:
        layout: the bridge's own: of the gather bridge, or the routes of the routed one.
        samples: of one global microbatch.
        sequence_length: tokens of a sample.
        sequence_parallel: the language side's TP ranks cut the sequence further.
    """

    layout: BridgeLayout | RouteLayout
    samples: int
    sequence_length: int
    sequence_parallel: bool = False

    @property
    def routed(self) -> bool:
        """Whether the routed bridge is drawn."""
        return isinstance(self.layout, RouteLayout)

    @property
    def stages(self) -> int:
        """Pipeline stages of the language side; rows go to the first."""
        return int(self.layout.dest_pp.max()) + 1 if isinstance(self.layout, RouteLayout) else 1

    def source_at(self, rank: int) -> tuple[int, int]:
        """Return a rank's (dp, tp) on the encoder's side."""
        at = self.layout
        if isinstance(at, BridgeLayout):
            return at.rank_to_src_pos[rank]
        place = rank - at.rank_offset
        return int(at.src_dp[place]), int(at.src_tp[place])

    def destination_at(self, rank: int) -> tuple[int, int, int, int]:
        """Return a rank's (dp, tp, cp, pp) on the language side."""
        at = self.layout
        if isinstance(at, BridgeLayout):
            dp, tp, cp = at.rank_to_dest_coords[rank]
            return dp, tp, cp, 0
        place = rank - at.rank_offset
        dp, tp, cp, pp = (int(c[place]) for c in (at.dest_dp, at.dest_tp, at.dest_cp, at.dest_pp))
        return dp, tp, cp, pp

    @property
    def cells(self) -> int:
        """Drawn blocks of samples: all samples, or equal blocks if those are too many."""
        finest = max(self.layout.src_dp_size, self.layout.dest_dp_size)
        fits = [n for n in range(finest, self.samples + 1, finest) if self.samples % n == 0]
        return max([n for n in fits if n <= _MAX_CELLS], default=finest)

    @property
    def shown(self) -> list[int]:
        """Ranks that get a row."""
        return list(self.layout.ranks)[:_MAX_ROWS]

    def source(self, rank: int) -> range:
        """Return the blocks of samples that a rank encodes."""
        return self._part(self.source_at(rank)[0], self.layout.src_dp_size)

    def destination(self, rank: int) -> range:
        """Return the blocks of samples that a rank's language model sees."""
        return self._part(self.destination_at(rank)[0], self.layout.dest_dp_size)

    def _part(self, dp: int, dp_size: int) -> range:
        size = self.cells // dp_size
        return range(dp * size, (dp + 1) * size)

    def positions(self, rank: int) -> list[int]:
        """Return the token positions that a rank's language model works on."""
        _, tp, cp, _ = self.destination_at(rank)
        tp_part = (tp, self.layout.dest_tp_size) if self.sequence_parallel else (0, 1)
        return dense_positions(self.sequence_length, cp, self.layout.dest_cp_size, *tp_part)

    def sends(self, group: ExchangeGroup) -> list[tuple[int, int]]:
        """Return (from, to) in ranks of rows of an exchange group whose tokens are all images'."""
        share = (self.samples // self.layout.dest_dp_size, self.sequence_length)
        rows = self.samples * self.sequence_length // self.layout.src_dp_size
        tokens = [TokenRuns.from_mask(np.ones(share, dtype=bool))] * group.dest_dps.size
        # All of a replica's rows as one item, which its CP ranks have parts of.
        held = rows_of_parts([[rows]] * group.src_dps.size, group.layout.src_cp_size)
        routes = GroupRoutes(group, tokens, held)
        pairs = []
        for rank in group.ranks.tolist():
            plan = routes.plan(rank)
            own = [(rank, rank)] if plan.local_index.size else []
            receivers = group.ranks[np.flatnonzero(plan.forward.send_splits)].tolist()
            pairs += own + [(rank, receiver) for receiver in receivers]
        return pairs


def plot_layout(
    path: Path,
    layouts: Sequence[BridgeLayout | RouteLayout],
    samples: int,
    sequence_length: int,
    *,
    sequence_parallel: bool = False,
) -> None:
    """Write what :func:`draw_layout` draws.

    Args:
        path: the PNG, or SVG by its suffix.
        layouts, samples, sequence_length, sequence_parallel: as of :func:`draw_layout`.
    """
    figure = draw_layout(layouts, samples, sequence_length, sequence_parallel=sequence_parallel)
    save_figure(figure, path, "the layout's plot")


def draw_layout(
    layouts: Sequence[BridgeLayout | RouteLayout],
    samples: int,
    sequence_length: int,
    *,
    sequence_parallel: bool,
) -> Figure:
    """Draw bridges below each other: encoder ranks left, the same ranks' language side right.

    Args:
        layouts: the objects that the bridges execute, one per encoder.
        samples: of one global microbatch.
        sequence_length: tokens of a sample.
        sequence_parallel: the language side's TP ranks cut the sequence further.
    """
    batch = (samples, sequence_length, sequence_parallel)
    plots = [LayoutPlot(layout, *batch) for layout in layouts]
    heights = [0.5 * len(plot.shown) + 2.6 for plot in plots]
    figure = Figure(figsize=(13, sum(heights)), layout="constrained")
    panels = figure.subplots(len(plots), 1, height_ratios=heights, squeeze=False).flat
    for axes, plot in zip(panels, plots, strict=True):
        _draw_bridge(axes, plot)
    return figure


def _draw_bridge(axes: Axes, plot: LayoutPlot) -> None:
    rows = len(plot.shown)
    axes.axis("off")
    axes.set_xlim(-2.6, _RIGHT + _STRIP + 3.4)
    axes.set_ylim(rows * _ROW + 1.5, -2.0)
    _draw_headers(axes, plot)
    for row, rank in enumerate(plot.shown):
        _draw_source(axes, plot, rank, row * _ROW)
        _draw_destination(axes, plot, rank, row * _ROW)
    (_draw_routes if plot.routed else _draw_moves)(axes, plot)
    axes.text(-2.5, rows * _ROW + 0.25, _caption(plot), va="top", fontsize=9.5, color=INK)


def _draw_headers(axes: Axes, plot: LayoutPlot) -> None:
    layout = plot.layout
    cp = f" · CP {layout.dest_cp_size}" if layout.dest_cp_size > 1 else ""
    left = f"{layout.src_name}: TP {layout.src_tp_size} · DP {layout.src_dp_size}"
    pp = f" · PP {plot.stages}" if plot.stages > 1 else ""
    right = f"{layout.dest_name}: TP {layout.dest_tp_size}{cp}{pp} · DP {layout.dest_dp_size}"
    middle = _direction(layout.src_dp_size, layout.dest_dp_size)
    per_cell = plot.samples // plot.cells
    what = "one sample" if per_cell == 1 else f"{per_cell} samples"
    legends = (
        f"a cell: the encoder's input of {what}",
        f"a cell: {what}, tokens 0 to {plot.sequence_length - 1} from left to right; "
        "coloured: the rank's own",
    )
    for start, text, legend in zip((_LEFT, _RIGHT), (left, right), legends, strict=True):
        axes.text(start, -1.45, text, fontsize=13, weight="bold", color=INK)
        axes.text(start, -0.95, legend, fontsize=8.5, color=MUTED)
        _draw_scale(axes, plot, start)
    center = (_LEFT + _STRIP + _RIGHT) / 2 - 0.1
    axes.text(center, -1.45, middle, fontsize=13, weight="bold", color=INK, ha="center")


def _direction(src_dp: int, dest_dp: int) -> str:
    """In words.

    >>> _direction(4, 2), _direction(2, 2), _direction(2, 3)
    ('fan-in, scale 2', 'equal, scale 1', 'DP 2 to 3')
    """
    low, high = sorted((src_dp, dest_dp))
    if high % low:
        return f"DP {src_dp} to {dest_dp}"
    word = "equal" if low == high else "fan-in" if src_dp > dest_dp else "fan-out"
    return f"{word}, scale {high // low}"


def _draw_scale(axes: Axes, plot: LayoutPlot, start: float) -> None:
    """The samples' numbers above a strip."""
    width, per_cell = _STRIP / plot.cells, plot.samples // plot.cells
    axes.text(start - 0.2, -0.35, "sample", fontsize=8.5, color=MUTED, ha="right")
    for cell in range(plot.cells):
        first = cell * per_cell
        fits = per_cell > 1 and plot.cells <= 8
        text = f"{first}–{first + per_cell - 1}" if fits else str(first)
        x = start + (cell + 0.5) * width
        axes.text(x, -0.35, text, ha="center", color=MUTED, fontsize=8.5 if width > 0.3 else 6)


def _color(plot: LayoutPlot, cell: int) -> tuple[float, ...]:
    return matplotlib.colormaps["turbo"](0.08 + 0.84 * cell / max(plot.cells - 1, 1))


def _box(axes: Axes, x: float, y: float, width: float, color: object, edge: str = "white") -> None:
    axes.add_patch(Rectangle((x, y + 0.14), width, _ROW - 0.28, fc=color, ec=edge, lw=0.8))


def _draw_source(axes: Axes, plot: LayoutPlot, rank: int, y: float) -> None:
    dp, tp = plot.source_at(rank)
    name: dict[str, Any] = {"va": "center", "ha": "right"}
    axes.text(-0.2, y + 0.34, f"rank {rank}", fontsize=10.5, weight="bold", color=INK, **name)
    axes.text(-0.2, y + 0.7, f"dp {dp} tp {tp}", fontsize=8, color=MUTED, **name)
    width, held = _STRIP / plot.cells, plot.source(rank)
    for cell in range(plot.cells):
        color = _color(plot, cell) if cell in held else _EMPTY
        _box(axes, _LEFT + cell * width, y, width, color)


def _draw_destination(axes: Axes, plot: LayoutPlot, rank: int, y: float) -> None:
    dp, tp, cp, pp = plot.destination_at(rank)
    coordinates = f"dp {dp} tp {tp}" + (f" cp {cp}" if plot.layout.dest_cp_size > 1 else "")
    coordinates += f" stage {pp}" if plot.stages > 1 else ""
    x = _RIGHT + _STRIP + 0.2
    axes.text(x, y + 0.34, f"rank {rank}", fontsize=10.5, weight="bold", color=INK, va="center")
    spans = ", ".join(f"{start}–{stop - 1}" for start, stop in _spans(plot.positions(rank)))
    axes.text(x, y + 0.7, f"{coordinates} · tokens {spans}", fontsize=8, color=MUTED, va="center")
    width, held = _STRIP / plot.cells, plot.destination(rank)
    for cell in range(plot.cells):
        left = _RIGHT + cell * width
        _box(axes, left, y, width, _EMPTY)
        if cell not in held:
            continue
        _box(axes, left, y, width, "white", "white")
        for start, stop in _spans(plot.positions(rank)):
            token = (width - 0.06) / plot.sequence_length
            part = (left + 0.03 + start * token, (stop - start) * token)
            # Later stages get hidden states of these tokens, no rows.
            faint = 1.0 if pp == 0 else 0.3
            _box(axes, part[0], y, part[1], (*_color(plot, cell)[:3], faint), "none")
        axes.add_patch(
            Rectangle((left + 0.03, y + 0.14), width - 0.06, _ROW - 0.28, fill=False, ec=_EDGE)
        )


def _spans(positions: list[int]) -> list[tuple[int, int]]:
    """Half-open runs of consecutive positions.

    >>> _spans([0, 1, 6, 7])
    [(0, 2), (6, 8)]
    """
    spans: list[tuple[int, int]] = []
    for position in positions:
        if spans and spans[-1][1] == position:
            spans[-1] = (spans[-1][0], position + 1)
        else:
            spans.append((position, position + 1))
    return spans


def _draw_moves(axes: Axes, plot: LayoutPlot) -> None:
    """Arrows from rank to rank in the colours of the gather groups; dashed ones are backward."""
    layout: Any = plot.layout
    groups = layout.gather_groups
    members = {rank: group for group in groups for rank in group}
    number = {rank: index for index, group in enumerate(groups) for rank in group}
    fan_in = layout.direction is BridgeDirection.FAN_IN
    for rank in plot.shown:
        color = _GROUP_COLORS[number[rank] % len(_GROUP_COLORS)] if groups else MUTED
        siblings = [other for other in members.get(rank, ()) if other != rank]
        _arrow(axes, plot, rank, rank, color, "forward")
        for other in siblings:
            _arrow(axes, plot, other, rank, color, "forward" if fan_in else "backward")


def _draw_routes(axes: Axes, plot: LayoutPlot) -> None:
    """Arrows from who encodes to who owns, in the colours of the exchange groups."""
    layout: Any = plot.layout
    for number, group in enumerate(layout.groups()):
        for source, target in plot.sends(group):
            color = _GROUP_COLORS[number % len(_GROUP_COLORS)]
            _arrow(axes, plot, source, target, color, "forward")


def _arrow(
    axes: Axes, plot: LayoutPlot, source: int, target: int, color: str, direction: str
) -> None:
    """Forward: left to right, solid. Backward: from the source's right side to the left, dashed."""
    if source not in plot.shown or target not in plot.shown:
        return
    rows = [(plot.shown.index(rank) + 0.5) * _ROW for rank in (source, target)]
    x = [_LEFT + _STRIP + 0.15, _RIGHT - 0.75]
    forward = direction == "forward"
    ends = list(zip(x if forward else x[::-1], rows, strict=True))
    style = {"ls": "-", "lw": 1.5} if forward else {"ls": (0, (4, 3)), "lw": 1.1}
    axes.add_patch(
        FancyArrowPatch(
            *ends, arrowstyle="-|>", mutation_scale=11, color=color, shrinkA=0, shrinkB=0, **style
        )
    )


def _caption(plot: LayoutPlot) -> str:
    rest = plot.layout.size - len(plot.shown)
    more = f"\n{rest} more ranks follow the same pattern" if rest else ""
    return (_routed_caption(plot) if plot.routed else _gather_caption(plot)) + more


def _routed_caption(plot: LayoutPlot) -> str:
    owners = "the rank" if plot.sequence_parallel else "the TP ranks"
    later = "\npale: later stages, which get hidden states" if plot.stages > 1 else ""
    return (
        f"forward (arrows): each row goes once, from a rank that encoded it to {owners} "
        "that own its token; a level arrow moves nothing\n"
        "backward: each row's gradient goes once, from an owner to every rank that encoded the row"
        + later
    )


def _gather_caption(plot: LayoutPlot) -> str:
    layout: Any = plot.layout
    groups = "  ".join(str(list(group)) for group in layout.gather_groups[:8])
    if len(layout.gather_groups) > 8:
        groups += f"  … ({len(layout.gather_groups)} groups)"
    cp = f"sum over the {layout.dest_cp_size} CP ranks, then " if layout.dest_cp_size > 1 else ""
    forward, backward = {
        BridgeDirection.FAN_IN: (
            f"all-gather in the groups {groups}",
            f"{cp}keep this rank's own samples",
        ),
        BridgeDirection.FAN_OUT: (
            "keep this rank's own samples",
            f"{cp}all-gather in the groups {groups}",
        ),
        BridgeDirection.EQUAL: ("identity", cp.removesuffix(", then ") or "identity"),
    }[layout.direction]
    dashed = " (dashed)" if layout.direction is BridgeDirection.FAN_OUT else ""
    return f"forward (solid): {forward}\nbackward{dashed}: {backward}"
