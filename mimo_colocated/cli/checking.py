# SPDX-License-Identifier: Apache-2.0
"""``mimo check``: a model's logits here, in any layout, against transformers'."""

from __future__ import annotations

from mimo_colocated.cli import models
from mimo_colocated.cli.options import CommandOptions
from mimo_colocated.launch.errors import JobError

BOUNDS = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 5e-3}
"""Dtype -> bound of the largest difference over the largest logit, as rounding allows."""


def check_first(options: CommandOptions) -> None:
    """Refuse what can be refused before ranks start.

    Raises:
        JobError: the folder or the layouts; a control that rounding would hide.
    """
    models.check_source(options.folder, options, ())
    if options.more["control"] and options.dtype != "float32":
        raise JobError(
            f"--control with --dtype {options.dtype}: a change of 1e-3 is within its rounding; "
            "use --dtype float32"
        )


def work(options: CommandOptions) -> None:
    """Compare all cases, on one rank of all.

    Raises:
        JobError: a case is above the bound.
    """
    from megatron.core.models.mimo.huggingface.logits_check import LogitsCheck

    assert options.dtype is not None
    bound = options.more["bound"] or BOUNDS[options.dtype]
    with models.one_sentence():
        check = LogitsCheck(models.build(options.folder, options, dtype=options.dtype))
        if options.more["control"]:
            models.say(f"control: {check.change_a_weight()} is changed by 1e-3")
        models.say(f"inputs: {check.source}; bound {bound:g} of the largest logit")
        wrong = []
        for verdict in check.cases():
            sample, position, token = verdict.where
            fits = verdict.error <= bound
            models.say(
                f"{verdict.case:14} {verdict.error:.1e}  worst: sample {sample}, position "
                f"{position}, token {token}  {'ok' if fits else 'ABOVE THE BOUND'}"
            )
            wrong += [] if fits else [verdict]
        name, off = check.worst_weight()
        worst = f"{name} is off by {off:.1e} of its largest element" if off else "all as read"
        models.say(f"weights        {worst}")
    if wrong:
        first = max(wrong, key=lambda verdict: verdict.error)
        raise JobError(
            f"the logits of '{first.case}' differ from transformers' by {first.error:.1e} of the "
            f"largest logit, more than {bound:g}"
            + (f"; weight {name} is not the folder's" * (off > 0))
        )
