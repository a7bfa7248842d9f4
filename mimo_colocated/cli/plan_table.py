# SPDX-License-Identifier: Apache-2.0
"""What ``mimo plan`` prints: a row per pair of layouts, the best homogeneous one below."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron.core.models.mimo.plan.estimates import Estimate, Plan, moved
from megatron.core.models.mimo.plan.footprint import MARGIN
from megatron.core.models.mimo.plan.shapes import Shapes, Work

_MB, _GB = 1e6, 1e9
_PARTS = ("encoder", "language", "tp", "cp", "ep", "bubble", "bridge", "dp", "optimizer")
_KEPT = ("encoder", "activations", "logits", "bridge", "batch")
_MEMORY = ("weights", "gradients", "optimizer", *_KEPT)


def text(found: Plan, shapes: Shapes, work: Work, top: int) -> str:
    """Return the table and what it says.

    Args:
        found: the estimates.
        shapes, work: what runs.
        top: rows.
    """
    chosen = [*found.colocated[:top], *found.homogeneous[:1]]
    if not chosen:
        return _verdict(found)
    time = _Unit.of((each.seconds.total for each in chosen), (("ms", 1e-3), ("us", 1e-6)))
    size = _Unit.of((each.memory.total for each in chosen), (("GB", _GB), ("MB", _MB)))
    head = (time.name, *_PARTS, size.name, "bridge MB", "spread", "layouts")
    rows = [_row(each, shapes, work, time, size) for each in chosen]
    lines = [*_aligned([head, *rows]), "", _verdict(found), ""]
    lines.append(f"memory of the fullest rank, row by row, {size.name}:")
    lines += _aligned([_MEMORY_HEAD, *(_memory(each, size) for each in chosen)])
    return "\n".join(lines)


@dataclass(frozen=True)
class _Unit:
    """What a column is said in."""

    name: str
    one: float

    @classmethod
    def of(cls, values: Iterable[float], units: Sequence[tuple[str, float]]) -> _Unit:
        """The first of two in which the least value has two digits; else the second."""
        least = min(values)
        return cls(*next((each for each in units if least >= 10 * each[1]), units[-1]))

    def said(self, value: float, digits: int = 0) -> str:
        """A value in it; a small one never as ``-0``."""
        number = round(value / self.one, digits)
        return f"{number + 0.0:.{digits}f}"


def bridges(each: Estimate, shapes: Shapes, work: Work) -> tuple[int, float]:
    """Return bytes that all bridges move in a step of the whole world, and the worst spread.

    Args:
        each: a row.
        shapes, work: what runs.
    """
    candidate = each.candidate
    found = [] if candidate.homogeneous else moved(candidate, shapes, work)
    traffic = sum(m.traffic.total * m.row_bytes for m in found) * candidate.microbatches
    return traffic, max((m.spread for m in found), default=1.0)


def _row(
    each: Estimate, shapes: Shapes, work: Work, time: _Unit, size: _Unit
) -> tuple[str, ...]:
    seconds, candidate = vars(each.seconds), each.candidate
    traffic, spread = bridges(each, shapes, work)
    said = str(candidate)
    return (
        time.said(each.seconds.total),
        *(time.said(seconds[name]) for name in _PARTS),
        size.said(each.memory.total, 1),
        f"{traffic / _MB:.0f}",
        f"{spread:.2f}",
        f"homogeneous: {said}" if candidate.homogeneous and shapes.encoders else said,
    )


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    return [
        "  ".join(
            cell if n == len(row) - 1 else cell.rjust(widths[n]) for n, cell in enumerate(row)
        )
        for row in rows
    ]


def _verdict(found: Plan) -> str:
    counts = (
        f"{len(found.colocated) + len(found.homogeneous)} ways fit, {len(found.rejected)} do not"
    )
    if found.gain is not None:
        return f"{100 * found.gain:+.1f} % against the best homogeneous layout; {counts}"
    if found.homogeneous and not found.colocated:
        return f"only homogeneous layouts fit; {counts}; --why LAYOUTS says why a pair does not"
    if not found.colocated:
        least = found.rejected[0]
        return (
            f"nothing fits: the smallest, {least.candidate}, needs "
            f"{least.memory.total / _GB:.1f} GB of {least.capacity / _GB:.1f} GB; take more GPUs"
        )
    return f"no homogeneous layout fits; {counts}" if found.rejected else counts


_MEMORY_HEAD = (*_MEMORY, "communicators", f"margin of {100 * MARGIN:.0f} %", "all", "layouts")


def _memory(each: Estimate, size: _Unit) -> tuple[str, ...]:
    memory = vars(each.memory)
    parts = [*(memory[n] for n in (*_MEMORY, "communicators", "margin")), each.memory.total]
    return (*(size.said(part, 1) for part in parts), str(each.candidate))
