# SPDX-License-Identifier: Apache-2.0
"""The plan as a table."""

from __future__ import annotations

from typing import Any, TextIO

from megatron.core.models.mimo.memory.plan import PartBytes, Step, plan


def print_plan(parts: PartBytes, step: Step, stream: TextIO | None = None) -> None:
    """Print a line per policy of encoder and projector, of one rank.

    Args:
        parts: of one microbatch.
        step: how microbatches run.
        stream: standard output by default.
    """
    from rich.console import Console
    from rich.table import Table

    console = Console(file=stream, highlight=False)
    if not console.is_terminal:
        console = Console(file=stream, highlight=False, width=132)
    table = Table(title=f"Encoder activations on one rank, MiB; {_words(step)}", title_style="bold")
    for heading in ("encoder", "projector"):
        table.add_column(heading, no_wrap=True)
    for heading in ("a microbatch", "of them", "together", "saving", "in backward",
                    "on the host", "copied a step", "computed again"):  # fmt: skip
        table.add_column(heading, justify="right")
    for each in plan(parts, step):
        table.add_row(
            each.memory.encoder,
            each.memory.projector,
            _mib(each.held),
            str(each.kept),
            _mib(each.total),
            _mib(each.saving),
            _mib(each.peak),
            _mib(each.host),
            _mib(each.moved),
            f"{float(each.extra_flops):.0%}",
        )
    console.print(table)
    console.print(
        "On the device while the language model runs: of a microbatch, how many there are at a "
        "time, of them together; and at most, when one of them is in its backward pass. Computed "
        "again: over the FLOPs of the modality's own forward and backward passes."
    )


def _words(step: Step) -> str:
    many = f"{step.microbatches} microbatch{'es' if step.microbatches > 1 else ''}"
    if step.stages == 1:
        return f"{many} a step" + (f", {step.encode_ahead} ahead" if step.encode_ahead else "")
    ahead = step.encode_ahead or "all"
    return f"{many} a step, {step.stages} pipeline stages, {ahead} encoded together"


def _mib(size: Any) -> str:
    return f"{size / 2**20:,.2f}"
