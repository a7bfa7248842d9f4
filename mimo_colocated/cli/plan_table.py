# SPDX-License-Identifier: Apache-2.0
"""What ``mimo plan`` prints: a row per pair of layouts, the best homogeneous one below."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
    lines = _aligned([_HEAD, *(_row(each, shapes, work) for each in chosen)])
    lines += ["", _verdict(found)]
    if chosen:
        lines += ["", "memory of the first row, GB:", f"  {_memory(chosen[0])}"]
    return "\n".join(lines)


_HEAD = ("ms", *_PARTS, "GB", "bridge MB", "spread", "layouts")


def _row(each: Estimate, shapes: Shapes, work: Work) -> tuple[str, ...]:
    seconds, candidate = vars(each.seconds), each.candidate
    bridges = [] if candidate.homogeneous else moved(candidate, shapes, work)
    # Of a step and the whole world; the spread is that of the worst encoder.
    traffic = sum(m.traffic.total * m.row_bytes for m in bridges) * candidate.microbatches / _MB
    spread = max((m.spread for m in bridges), default=1.0)
    said = str(candidate)
    return (
        f"{1000 * each.seconds.total:.0f}",
        *(str(round(1000 * seconds[name])) for name in _PARTS),  # never "-0"
        f"{each.memory.total / _GB:.1f}",
        f"{traffic:.0f}",
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
    if not found.colocated:
        if not found.rejected:
            return "no pair of layouts can run; --why LAYOUTS says why one cannot"
        least = found.rejected[0]
        return (
            f"nothing fits: the smallest, {least.candidate}, needs "
            f"{least.memory.total / _GB:.1f} GB of {least.capacity / _GB:.1f} GB; take more GPUs"
        )
    return f"no homogeneous layout fits; {counts}" if found.rejected else counts


def _memory(each: Estimate) -> str:
    memory: dict[str, Any] = vars(each.memory)
    parts = [f"{name} {memory[name] / _GB:.1f}" for name in _MEMORY]
    parts.append(f"communicators {memory['communicators'] / _GB:.1f}")
    parts.append(f"margin of {100 * MARGIN:.0f} % {memory['margin'] / _GB:.1f}")
    return ", ".join(parts)
