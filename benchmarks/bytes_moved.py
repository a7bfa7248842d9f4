# SPDX-License-Identifier: Apache-2.0
"""Bytes that come to each rank, counted at the collective calls, against the formulas.

Exactly equal on every rank: to the formula for uniform tokens, to the lower bound for uneven ones
(which the gather bridge cannot move).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.cases import PAIRS, Pair, TokenBatch
from benchmarks.counting import Traffic, counted
from benchmarks.formulas import Rows, gather_rows, lower_bound, routed_rows
from benchmarks.paths import Bridges, bridges, random_rows
from megatron.core.models.mimo.comm.plan.routes import plan_routes

_ROWS, _WIDTH, _LENGTH = 1024, 64, 128
_BYTES = _WIDTH * torch.float32.itemsize
COLUMNS = {
    "layout": "layout (encoder/language)",
    "tokens": "tokens",
    "gather": "gather, forward | backward",
    "routed": "routed, forward | backward",
    "fewer": "fewer bytes",
    "sent": "most sent by a rank",
    "control": "control",
}


def measure(pairs: tuple[Pair, ...], quick: bool) -> Iterator[dict[str, Any]]:
    """A cell per pair and kind of tokens; on all ranks."""
    for pair in pairs or (PAIRS[:3] if quick else PAIRS):
        with bridges(pair) as made:
            yield _uniform(made)
            yield _uneven(made)


def _uniform(made: Bridges) -> dict[str, Any]:
    pair, batch = made.pair, TokenBatch.uniform(made.pair, _ROWS)
    gather = _pass(made, batch, lambda rows: made.gather.communicate(rows))
    routed = _pass(made, batch, _move(made, batch))
    expected = [gather_rows(pair) * _ROWS, routed_rows(pair) * _ROWS]
    cell = _cell(pair, "uniform", routed)
    cell["gather"] = _pair_of([part.received for part in gather])
    cell["fewer"] = _pair_of(
        [_fewer(one.received, other.received) for one, other in zip(gather, routed, strict=True)]
    )
    cell["expected"] = [[float(rows) * _BYTES for rows in _both(each)] for each in expected]
    same = _equals(gather, expected[0]) and _equals(routed, expected[1])
    return cell | {"passed": _everywhere(same)}


def _uneven(made: Bridges) -> dict[str, Any]:
    pair, batch = made.pair, TokenBatch.uneven(made.pair, _LENGTH, seed=1)
    routed = _pass(made, batch, _move(made, batch))
    bound = lower_bound(pair, batch, dist.get_rank())
    cell = _cell(pair, "uneven", routed)
    return cell | {"passed": _everywhere(_equals(routed, bound))}


def _move(made: Bridges, batch: TokenBatch) -> Callable[[torch.Tensor], torch.Tensor]:
    rank = dist.get_rank()
    plan = plan_routes(made.routed.layout, rank, *batch.of_group(made.pair, rank))

    def move(rows: torch.Tensor) -> torch.Tensor:
        made.routed.announce(plan, rows[:0])
        moved = made.routed.move(made.routed.confirm(plan, rows), plan)
        made.routed.settle()
        return moved

    return move


def _pass(
    made: Bridges, batch: TokenBatch, move: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[Traffic, Traffic]:
    """This rank's traffic forward and backward."""
    rows = random_rows(made.pair, batch, _WIDTH, torch.float32)
    with counted() as forward:
        moved = move(rows)
    with counted() as backward:
        moved.backward(torch.ones_like(moved))
    return forward, backward


def _both(rows: Rows) -> tuple[Any, Any]:
    return rows.forward, rows.backward


def _equals(traffic: tuple[Traffic, Traffic], rows: Rows) -> bool:
    """To the byte."""
    pairs = zip(traffic, _both(rows), strict=True)
    return all(part.received == expected * _BYTES for part, expected in pairs)


def _everywhere(passed: bool) -> bool:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, passed)
    return all(found)


def _cell(pair: Pair, tokens: str, routed: tuple[Traffic, Traffic]) -> dict[str, Any]:
    """Means over the ranks; every rank gives them."""
    parts = [[part.received, part.sent, part.control] for part in routed]
    mine = torch.tensor(parts, dtype=torch.float64)
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    table = torch.stack(found)
    mean = table.mean(dim=0)
    return {
        "layout": str(pair),
        "tokens": tokens,
        "gather": None,
        "routed": _pair_of(mean[:, 0].tolist()),
        "fewer": None,
        "sent": _pair_of(table[:, :, 1].max(dim=0).values.tolist()),
        "control": _pair_of(mean[:, 2].tolist()),
    }


def _pair_of(values: list[float]) -> list[float]:
    return [round(value, 3) for value in values]


def _fewer(gather: float, routed: float) -> float:
    return gather / routed if routed else float(gather == routed)
