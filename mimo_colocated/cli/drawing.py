# SPDX-License-Identifier: Apache-2.0
"""``mimo draw``: which rank holds what, from the objects that execute."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from mimo_colocated.cli.options import ENCODERS
from mimo_colocated.launch.errors import JobError
from mimo_colocated.launch.layouts import LANGUAGE, Layout, Layouts, Limits, check_layouts

_NAMES = ("tp", "cp", "dp", "pp")
_MOST = 512


def run(options: Any) -> None:
    """Write the picture.

    Args:
        options: of ``mimo draw``.

    Raises:
        JobError: layouts that do not fit, or matplotlib is missing.
    """
    found = vars(options)
    encoders = {n: Layout.parse(found[n], n) for n in ENCODERS if found[n] is not None}
    if not encoders or options.language is None:
        raise JobError("give --language and --vision or --audio, as in --vision tp=1,dp=8")
    language = Layout.parse(options.language, LANGUAGE)
    for name, at in {**encoders, LANGUAGE: language}.items():
        if options.samples % at.dp:
            fitting = math.lcm(*(each.dp for each in (*encoders.values(), language)))
            raise JobError(
                f"--samples {options.samples} does not divide over {name} dp={at.dp}; "
                f"draw --samples {fitting}"
            )
    limits = Limits(
        options.samples,
        sequence_parallel=options.sequence_parallel,
        sequence_length=options.seq,
        cut_items=tuple(encoders) if options.bridge == "routed" else (),
    )
    check_layouts(Layouts(encoders, language), limits)
    if language.size > _MOST:
        raise JobError(f"{language.size} ranks are too many to draw; up to {_MOST} can be")
    if options.bridge == "gather" and language.pp > 1:
        raise JobError(
            f"--bridge gather with pp={language.pp} has no picture of its own; draw --bridge routed"
        )
    target = Path(options.target).expanduser()
    if target.suffix.lower() not in (".png", ".svg"):
        raise JobError(f"{target} must end in .png or .svg")
    _draw(target, encoders, language, options)


def _draw(target: Path, encoders: dict[str, Layout], language: Layout, options: Any) -> None:
    try:
        from megatron.core.models.mimo.job.layout_plot import plot_layout
    except ModuleNotFoundError as error:
        raise JobError(f"a picture needs {error.name}; install it with pip") from None
    layouts = [
        bridge_of(name, encoder, language, options.bridge, options.sequence_parallel)
        for name, encoder in encoders.items()
    ]
    plot_layout(
        target,
        layouts,
        options.samples,
        options.seq,
        sequence_parallel=options.sequence_parallel,
    )


def bridge_of(
    name: str, encoder: Layout, language: Layout, kind: str, sequence_parallel: bool
) -> Any:
    """Return the layout that a bridge executes.

    Args:
        name: of the encoder.
        encoder, language: the layouts.
        kind: ``"routed"`` or ``"gather"``.
        sequence_parallel: the language model cuts its sequence over TP, too.
    """
    from megatron.core.hyper_comm_grid import GridShape
    from megatron.core.models.mimo.comm.plan.gather_layout import BridgeLayout
    from megatron.core.models.mimo.comm.plan.routed_layout import RouteLayout

    source, destination = (
        GridShape((at.tp, at.cp, at.dp, at.pp), _NAMES) for at in (encoder, language)
    )
    if kind == "gather":
        return BridgeLayout.from_grids(source, destination, name, LANGUAGE)
    return RouteLayout.from_grids(
        source, destination, name, LANGUAGE, sequence_parallel=sequence_parallel
    )
