# SPDX-License-Identifier: Apache-2.0
"""The plots of docs/bridge.md and docs/pipeline.md: who holds, who needs, what moves.

``python -m benchmarks.plots [FOLDER]`` draws them from the objects that the bridges execute:
:class:`BridgeLayout` for the gather bridge, one :class:`RoutePlan` per rank for the routed one.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from benchmarks.cases import Pair, TokenBatch
from megatron.core.models.mimo.comm.plan.routes import RoutePlan, plan_routes
from megatron.core.models.mimo.comm.plan.token_runs import TokenRuns
from megatron.core.models.mimo.job.plots import INK, MUTED, save_figure
from mimo_colocated.launch.layouts import Layout

_STRIP, _GAP = 4.0, 3.4  # in units of the drawing: a rank's strip is 1 high
_COLORS = ("#0969da", "#bc4c00", "#1a7f37", "#8250df")
_EMPTY = "#eef1f4"

EXAMPLE = Pair(Layout(tp=1, dp=4), Layout(tp=1, cp=2, dp=2))
STAGES = Pair(Layout(tp=1, dp=4), Layout(tp=1, cp=2, pp=2))


@dataclass(frozen=True)
class Half:
    """One direction of one bridge.

    Attributes:
        title: above it.
        left, right: what each rank has before and after: rows that it uses.
        passing: rows that are with a rank on the right although it does not use them.
        moves: (from, to, rows) over the wire.
    """

    title: str
    left: Sequence[np.ndarray]
    right: Sequence[np.ndarray]
    passing: Sequence[np.ndarray]
    moves: Sequence[tuple[int, int, int]]


def example_batch(pair: Pair = EXAMPLE) -> TokenBatch:
    """Two samples per language replica, 4 image tokens among 8 tokens each."""
    mask = np.array([[0, 1, 1, 0, 0, 1, 1, 0]] * 2, dtype=bool)
    tokens = (TokenRuns.from_mask(mask),) * pair.language.dp
    total = tokens[0].count * pair.language.dp
    return TokenBatch(tokens, (total // pair.vision.dp,) * pair.vision.dp)


def routed_halves(pair: Pair, batch: TokenBatch) -> list[Half]:
    """Forward and backward of the routed bridge, read off the plans of all ranks."""
    ranks = range(pair.world_size)
    layout = pair.route_layout()
    plans = [plan_routes(layout, rank, *batch.of_group(pair, rank)) for rank in ranks]
    held = [batch.held_rows(pair, rank) for rank in ranks]
    owned = [batch.owned_rows(pair, rank) for rank in ranks]
    nothing = [np.empty(0, dtype=np.int64)] * len(ranks)
    return [
        Half("routed, forward: rows to their owners", held, owned, nothing, _sends(plans, True)),
        Half("routed, backward: gradients to the holders", owned, held, nothing,
             _sends(plans, False)),
    ]  # fmt: skip


def _sends(plans: Sequence[RoutePlan], forward: bool) -> list[tuple[int, int, int]]:
    moves = []
    for plan in plans:
        leg = plan.forward if forward else plan.backward
        pairs = zip(plan.ranks.tolist(), leg.send_splits.tolist(), strict=True)
        moves += [(plan.rank, receiver, rows) for receiver, rows in pairs if rows]
    return moves


def gather_halves(pair: Pair, batch: TokenBatch) -> list[Half]:
    """Forward and backward of the gather bridge on a fan-in, read off its layout."""
    layout, ranks = pair.bridge_layout(), range(pair.world_size)
    held = [batch.held_rows(pair, rank) for rank in ranks]
    owned = [batch.owned_rows(pair, rank) for rank in ranks]
    total = sum(batch.held)
    parts = [layout.dest_slice(rank, total) for rank in ranks]
    whole = [part.start + np.arange(part.size) for part in parts]
    passing = [np.setdiff1d(*both) for both in zip(whole, owned, strict=True)]
    gathered = [
        (sender, receiver, held[sender].size)
        for group in layout.gather_groups
        for sender in group
        for receiver in group
        if sender != receiver
    ]
    back = [np.setdiff1d(*both) for both in zip(whole, held, strict=True)]
    return [
        Half("gather, forward: all rows of a replica to each of its ranks", held, owned, passing,
             gathered),
        Half("gather, backward: summed over CP, then cut to the held rows", owned, held, back,
             _ring(pair, whole[0].size)),
    ]  # fmt: skip


def _ring(pair: Pair, rows: int) -> list[tuple[int, int, int]]:
    """An all-reduce over CP: to the next rank of the ring, ``2 (1 - 1/c) N`` rows."""
    cp, coords = pair.language.cp, pair.bridge_layout().rank_to_dest_coords
    volume = 2 * rows * (cp - 1) // cp
    at = {place: rank for rank, place in coords.items()}
    return [
        (rank, at[dp, tp, (c + 1) % cp], volume) for rank, (dp, tp, c) in coords.items() if cp > 1
    ]


def draw(path: Path, halves: Sequence[Half], total: int) -> None:
    """Both directions side by side.

    Args:
        path: the PNG.
        halves: forward and backward.
        total: rows of the global batch.
    """
    ranks = len(halves[0].left)
    figure = Figure(figsize=(13, 0.62 * ranks + 1.0), layout="constrained")
    for axes, half in zip(figure.subplots(1, 2), halves, strict=True):
        axes.axis("off")
        axes.set_xlim(-0.9, 2 * _STRIP + _GAP + 0.1)
        axes.set_ylim(ranks + 0.75, -1.0)
        axes.text(-0.8, -0.65, half.title, fontsize=11, weight="bold", color=INK)
        for rank in range(ranks):
            axes.text(-0.15, rank + 0.5, f"rank {rank}", ha="right", va="center", color=INK)
            _strip(axes, 0.0, rank, total, half.left, half.left[rank], ())
            right = _STRIP + _GAP, rank, total, half.left
            _strip(axes, *right, half.right[rank], half.passing[rank])
        for move in half.moves:
            _arrow(axes, *move, len(half.moves) > ranks)
        moved = sum(rows for _, _, rows in half.moves)
        axes.text(-0.8, ranks + 0.45, f"over the wire: {moved} rows in all", color=MUTED)
    save_figure(figure, path, "the plot")


def _strip(
    axes: Axes,
    x: float,
    rank: int,
    total: int,
    origin: Sequence[np.ndarray],
    used: np.ndarray,
    passing: Sequence[int] | np.ndarray,
) -> None:
    """The rows of the global batch; those that the rank has in the colour of where they were."""
    width = _STRIP / total
    first = {int(row): place for place, rows in enumerate(origin) for row in rows}
    used, passing = set(map(int, used)), set(map(int, passing))
    for row in range(total):
        color: Any = _COLORS[first[row] % len(_COLORS)] if row in used | passing else _EMPTY
        alpha, hatch = (0.25, "////") if row in passing else (1.0, None)
        box = {"fc": color, "ec": "white", "alpha": alpha, "hatch": hatch, "lw": 0.8}
        axes.add_patch(Rectangle((x + row * width, rank + 0.2), width, 0.6, **box))


def _arrow(axes: Axes, sender: int, receiver: int, rows: int, crowded: bool) -> None:
    ends = (_STRIP + 0.1, sender + 0.5), (_STRIP + _GAP - 0.1, receiver + 0.5)
    color = _COLORS[sender % len(_COLORS)]
    axes.add_patch(
        FancyArrowPatch(*ends, arrowstyle="-|>", mutation_scale=11, color=color, shrinkA=0,
                        shrinkB=0, lw=1.4)
    )  # fmt: skip
    # A third of the way, where arrows that cross have parted.
    along = 0.2 if crowded else 0.3
    x, y = (start + along * (end - start) for start, end in zip(*ends, strict=True))
    box = {"fc": "white", "ec": "none", "pad": 0.6}
    axes.text(x, y, str(rows), fontsize=9, color=color, ha="center", va="center", bbox=box)


def main(folder: Path) -> None:
    """Draw ``bridge_gather.png``, ``bridge_routed.png`` and ``pipeline_routes.png``."""
    batch = example_batch()
    total = sum(batch.held)
    draw(folder / "bridge_gather.png", gather_halves(EXAMPLE, batch), total)
    draw(folder / "bridge_routed.png", routed_halves(EXAMPLE, batch), total)
    batch = example_batch(STAGES)
    draw(folder / "pipeline_routes.png", routed_halves(STAGES, batch), sum(batch.held))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs"))
