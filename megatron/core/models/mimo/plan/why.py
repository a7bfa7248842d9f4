# SPDX-License-Identifier: Apache-2.0
"""Why a pair of layouts is not the first choice, in words."""

from __future__ import annotations

from collections.abc import Mapping

from megatron.core.models.mimo.plan.candidates import VIRTUAL_STAGES, Candidate, Search, problem
from megatron.core.models.mimo.plan.estimates import Estimate, fastest_that_fits
from megatron.core.models.mimo.plan.machine import Machine
from megatron.core.models.mimo.plan.shapes import Shapes, Work
from mimo_colocated.launch.layouts import Layout

_GB = 1e9
# Parts of time that differ by less are not worth a line.
_WORTH = 0.01


def variants(
    language: Layout, encoders: Mapping[str, Layout], work: Work, search: Search
) -> list[Candidate]:
    """Return a pair with every number of microbatches and of virtual stages that is tried.

    Args:
        language: its layout.
        encoders: those of the encoders; none for the homogeneous way.
        work: the step.
        search: what is tried.
    """
    found = []
    for count in search.replica_samples:
        m = max(1, work.samples // (language.dp * count))
        for virtual in VIRTUAL_STAGES if language.pp > 1 else (1,):
            bridge = search.bridge if encoders else "routed"
            found.append(Candidate(language, encoders, m, virtual, bridge=bridge))
    # Equal ones once.
    return list({str(each): each for each in found}.values())


def why(
    wanted: list[Candidate],
    shapes: Shapes,
    work: Work,
    machine: Machine,
    search: Search,
    best: Estimate | None,
) -> str:
    """Return why a pair cannot run, does not fit or is slower than the best one.

    Args:
        wanted: the pair, as :func:`variants` returns it.
        shapes, work, machine: what runs, on what, and where.
        search: what is tried.
        best: the first choice; None if nothing fits.
    """
    problems = [problem(each, shapes, work) for each in wanted]
    runs = [each for each, wrong in zip(wanted, problems, strict=True) if wrong is None]
    if not runs:
        said = dict.fromkeys(wrong for wrong in problems if wrong)
        return f"{wanted[0]} cannot run: " + "; ".join(said)
    tried = [fastest_that_fits(each, shapes, work, machine, search) for each in runs]
    fitting = [each for each in tried if each.fits]
    if not fitting:
        return _too_large(min(tried, key=lambda each: each.memory.total))
    chosen = min(fitting, key=lambda each: each.seconds.total)
    return _slower(chosen, best)


def _too_large(each: Estimate) -> str:
    parts = sorted(vars(each.memory).items(), key=lambda part: -part[1])
    listed = ", ".join(f"{name} {size / _GB:.1f}" for name, size in parts if size > 0.05 * _GB)
    return (
        f"{each.candidate} does not fit, whatever is recomputed or offloaded: the fullest rank "
        f"needs {each.memory.total / _GB:.1f} GB of {each.capacity / _GB:.1f} GB ({listed}); more "
        "TP, CP or stages of the language model make every part of it smaller"
    )


def _slower(each: Estimate, best: Estimate | None) -> str:
    text = (
        f"{each.candidate} takes {1000 * each.seconds.total:.0f} ms a step and "
        f"{each.memory.total / _GB:.1f} GB of {each.capacity / _GB:.1f} GB"
    )
    if best is None or each.seconds.total <= best.seconds.total:
        return f"{text}; nothing that was tried is faster"
    ratio = 100 * (each.seconds.total / best.seconds.total - 1)
    lines = [
        f"{text}, {ratio:.1f} % more than the first choice, {best.candidate}, with "
        f"{1000 * best.seconds.total:.0f} ms"
    ]
    theirs = vars(best.seconds)
    for name, seconds in vars(each.seconds).items():
        more = seconds - theirs[name]
        if abs(more) > _WORTH * best.seconds.total:
            lines.append(
                f"  {name}: {1000 * seconds:.0f} ms, {1000 * more:+.0f} ms to the first choice's"
            )
    return "\n".join(lines)
