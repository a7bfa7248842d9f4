# SPDX-License-Identifier: Apache-2.0
"""docs/parity.md, written from the results: ``python -m tests.parity --docs docs/parity.md``."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from campaigns.record import Result, versions
from tests.parity.compare import Tolerances, tolerances
from tests.parity.rows import CHANGE_STEPS, Row

if TYPE_CHECKING:
    from tests.parity.campaign import Parity

_INTRO = """\
# Parity with one process

Written by `make parity ARGS="--docs docs/parity.md"`; change `tests/parity/docs.py`, not this file.

Every row trains a small model on several ranks and compares it with the same model on **one
process, unsharded**, fed the same samples in one microbatch. Nothing is copied from one run to the
other: initial weights are a function of the seed and of the weights' names, batches of the seed
and of the step. Rows named `text-` are the language model alone, over pipeline stages too, on
Megatron-Core's own schedules; all others are an encoder and a language model on the same ranks,
those named `pp` with pipeline stages of the language model, those named `several-encoders` with two
encoders, of images and of spoken digits. Of these each sample shows its digits as images, as
sounds, as a mix of both or as text, so some ranks and microbatches have no sound or no image.
Encoders of rows named `encoder-cp` cut each item's sequence over CP ranks of their own.
Rows named `torch-native` have a CLIP tower or a Qwen2 of transformers, which PyTorch shards.
The task is reading handwritten digits, which both learn in a few steps.
"""

_HOW = """\
## How to read it

*Worst error* is the largest of all checks of the row, on all ranks, each in units of what it is
allowed; *in* says which check and which tensor that was. A relative error is the norm of the
difference over the norm of what is expected, per tensor. Where zeros are expected, only zeros pass.

| check | what is compared | allowed, fp32 | allowed, bf16 | allowed, fp16 |
|---|---|---|---|---|
{checks}

"""

_WHY = """\
Why these numbers:

- Weights and token counts are moved and counted, not computed: **bit-exact**.
- A gradient is the same sum in another order. In fp32 each rounding is 2^-24 = 6e-8 of an element,
  and after the chain of sums through this model some 1e-7 to 1e-6 of a tensor: 1e-5 leaves room,
  and is far below the error of order 1 that a lost, doubled or wrongly divided contribution makes.
  Gradients are gathered to their full shape first: query groups of QKV weights stay together, the
  halves of a gated MLP's first layer are put back in place, and what the distributed optimizer has
  reduced on other ranks is fetched from there.
- Logits, losses and curves follow from those through the layers; `THRESH` bounds them.
- Of the weights the **change** over {change_steps} steps is compared. Changes are about 1e-3 of
  weights of about 0.1: held against the weights, a change that is wrong altogether could pass a
  bound of 1e-2. Adam divides each gradient by its own size, so the smallest elements, which are
  mostly rounding, move as far as the largest: `THRESH`.
- bf16 rounds to 2^-8 at each of about 60 operations on the way through this model and back; such
  errors add up as sqrt(60) * 2^-8 = 3e-2. Adam's step has the sign of its gradient, and a share of
  about r of gradients that are off by r has the wrong one: sqrt(4 r) of the change's norm. The
  weights compared are the optimizer's fp32 ones.
- fp16 rounds to 2^-11: sqrt(60) * 2^-11 = 4e-3, doubled because PyTorch's layer norm on CPU adds
  up the gradients of its weights in fp16 (3e-3 by itself). Of the change, one element of the
  smallest weights (32) may have the wrong sign. The dynamic loss scale starts low enough that no
  step is skipped.
- The loss must fall, not only follow: two runs that both learn nothing would agree.

The models' token losses are this project's own (`transformer/exact_loss.py`): Megatron-Core's fused
native cross entropy rounds the gradient of the logits to bf16, in fp32 runs too. That is an error
of about 1e-3 in every gradient, and because both runs round alike, the comparison would only see
the single elements that fall on the other side of a rounding boundary, at about 1e-5.

What the errors stand for: of order 1 is a lost or doubled contribution (no sum over CP, a replica
counted twice); a simple fraction, such as 0.5 or 0.75, a wrong divisor; 1e-3 to 1e-2 in a few
tensors a wrong position, mask or rounding step; just above the bound in many tensors arithmetic in
another precision.

## Choose and repeat

```bash
make parity                                      # the rows above
make parity LAYOUTS="bf16,fan-in-*"              # some, by name or pattern
make parity THRESH=1e-3 TRAIN_STEPS=20 MICRO_BATCHES=4
make parity-nightly                              # and every pair of 8-rank layouts; resumes
make parity-nightly ARGS=--fresh                 # from the start
.venv/bin/python -m tests.parity --help
```

`MICRO_BATCHES` is for the `text-` rows; the others say theirs in their names. Results are in
`runs/parity/summary.json` and `runs/parity-nightly/summary.json`; the exit code is 1 if a row
fails or is missing. A row that crashes or hangs fails with its reason, and the rest still runs.
"""

_KINDS = {
    "initial weights": ("every weight before the first step", "initial"),
    "tokens": ("tokens counted over all ranks and microbatches", "initial"),
    "logits": ("output of the first step's samples", "logits"),
    "loss": ("mean over the counted tokens of the first step", "loss"),
    "gradients": ("every parameter's, before the optimizer", "gradients"),
    "grad norm": ("as the optimizer computes it, over both modules", "grad_norm"),
    "change of weights": ("every weight's, over {change_steps} optimizer steps", "change"),
    "curve": ("the loss of every training step", "curve"),
}


def page(campaign: Parity, results: Mapping[str, Result]) -> str:
    """Return the page of these results, as Markdown."""
    checks = "\n".join(_checks(campaign.thresh)).format(change_steps=CHANGE_STEPS)
    return "\n".join(
        [
            _INTRO,
            "## The table as last run\n",
            _circumstances(campaign, results),
            *_table(campaign, results),
            "",
            _HOW.format(checks=checks),
            _WHY.format(change_steps=CHANGE_STEPS),
        ]
    )


def _circumstances(campaign: Parity, results: Mapping[str, Result]) -> str:
    known, there = versions(), results.values()
    backends = sorted({r["backend"] for r in there if "backend" in r})
    good = sum(r["passed"] for r in there)
    return (
        f"{good} of {len(campaign.rows)} rows pass. {platform.system()} {platform.machine()}, "
        f"{' and '.join(backends)}, Python {known['python']}, torch {known['torch']}, "
        f"megatron-core {known['megatron-core']}; THRESH {campaign.thresh:g}, "
        f"TRAIN_STEPS {campaign.steps}, MICRO_BATCHES {campaign.micro_batches}.\n"
    )


def _table(campaign: Parity, results: Mapping[str, Result]) -> Iterator[str]:
    yield "| row | encoder | language model | with | | worst error | allowed | in |"
    yield "|---|---|---|---|---|---|---|---|"
    for row in campaign.rows.values():
        name, verdict, error, allowed, where = campaign.row(row.name, results.get(row.name))
        options = _options(row, campaign.micro_batches)
        parts = (name, _encoders(row), _sizes(row.language), options)
        yield f"| {' | '.join(parts)} | {verdict} | {error} | {allowed} | {where} |"


def _encoders(row: Row) -> str:
    """Of one encoder its sizes, of two both with what they encode."""
    if not row.audio:
        return _sizes(row.vision)
    return f"images {_sizes(row.vision)}, sounds {_sizes(row.audio)}"


def _sizes(layout: str) -> str:
    """``"tp=2,pp=1,dp=4"`` -> ``"TP2 DP4"``; axes of one rank say nothing, but ETP."""
    pairs = (part.partition("=") for part in layout.split(",") if part)
    said = ((axis, size) for axis, _, size in pairs if size != "1" or axis == "etp")
    return " ".join(f"{axis.upper()}{size}" for axis, size in said)


def _options(row: Row, micro_batches: int) -> str:
    said = [f"{row.resolved_micro_batches(micro_batches)} mb", row.masks]
    said += ["tied"] if row.tied else []
    said += ["SP"] if row.sequence_parallel and "TP" in _sizes(row.language) else []
    said += ["distributed optimizer"] if row.distributed_optimizer else []
    said += ["overlap"] if row.overlap else []
    said += [f"{row.freeze} frozen"] if row.freeze else []
    said += [f"{row.bridge} bridge"] if row.bridge != "routed" else []
    said += [f"torch-native {' and '.join(row.native)}"] if row.native else []
    said += ["packed"] if row.packed else []
    said += ["samples of 1 to 4 images"] if row.varied else []
    said += ["experts"] if row.experts else []
    said += {"all": [], "mixed": ["images in a quarter of the samples"], "none": ["no images"]}[
        row.images
    ]
    said += [f"{row.layers} layers"] if row.layers != 2 else []
    said += [f"{row.virtual_stages} virtual stages"] if row.virtual_stages > 1 else []
    said += [f"{row.encode_ahead} mb encoded ahead"] if row.encode_ahead else []
    said += [f"{row.encode_in_bubbles} mb in bubbles"] if row.encode_in_bubbles else []
    said += [f"{row.recompute} recompute"] if row.recompute != "none" else []
    memory = {"encoder": row.encoder_memory, "projector": row.projector_memory}
    said += [f"{part} memory {how}" for part, how in memory.items() if how != "keep"]
    said += [row.dtype] if row.dtype != "float32" else []
    return ", ".join(said)


def _checks(thresh: float) -> Iterator[str]:
    bounds = [tolerances(dtype, thresh) for dtype in ("float32", "bfloat16", "float16")]
    for kind, (what, field) in _KINDS.items():
        yield f"| {kind} | {what} | {' | '.join(_bound(each, field) for each in bounds)} |"
    yield "| loss falls | last loss over first | below 1 | below 1 | below 1 |"


def _bound(bounds: Tolerances, field: str) -> str:
    value = getattr(bounds, field)
    return f"{value:.0e}" if value else "0, bit-exact"
