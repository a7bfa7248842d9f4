# SPDX-License-Identifier: Apache-2.0
"""How long a pipelined step takes. Pure floats."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Passes:
    """Seconds of one microbatch's passes.

    Attributes:
        forward, backward: of a rank's layers, all of its virtual stages together.
        first_forward, first_backward: what only the first stage does beside, such as an encoder
            that lies on it.
        last_forward, last_backward: what only the last stage does beside, the output layer.
    """

    forward: float
    backward: float
    first_forward: float = 0.0
    first_backward: float = 0.0
    last_forward: float = 0.0
    last_backward: float = 0.0


def pipeline_seconds(passes: Passes, microbatches: int, stages: int, virtual: int) -> float:
    """Return seconds of one step that runs one forward and one backward pass in turn (1F1B).

    With equal stages a step takes ``(m + (p - 1) / v) (f + b)`` (Narayanan et al. 2021, "Efficient
    Large-Scale Language Model Training on GPU Clusters Using Megatron-LM", 2.2). A first stage
    with ``e`` and ``e'`` more to do does so for each of its ``m`` microbatches, but some of it in
    time that it would have waited. Before the first gradient comes back it waits for
    ``(p - 1)(f + b) / v`` less ``n - 1`` forward passes, ``n = min(m, p)``. In the end it waits
    ``n - 1`` times for as much of a forward pass as its own backward pass leaves. A last stage
    with more to do is always busy once the first microbatch has come. The slower of the two is
    the step.

    With more than one virtual stage the waiting times are those of stages of ``1 / v``.

    Args:
        passes: seconds of a microbatch on one rank.
        microbatches: of a step.
        stages: ranks of the pipeline.
        virtual: stages of a rank.

    >>> pipeline_seconds(Passes(1, 2), 4, 2, 1)
    15.0
    >>> pipeline_seconds(Passes(1, 2), 4, 2, 2)
    13.5
    """
    f, b = passes.forward, passes.backward
    e_f, e_b = passes.first_forward, passes.first_backward
    last = passes.last_forward + passes.last_backward
    if stages == 1:
        return microbatches * (f + b + e_f + e_b + last)
    some = min(microbatches, stages)
    short_f, short_b = f / virtual, b / virtual
    filling = (stages - 1) * (short_f + short_b)
    waits = max(0.0, filling + last - (some - 1) * (short_f + e_f))
    gaps = (some - 1) * max(0.0, short_f + last - e_b)
    by_first = microbatches * (f + b + e_f + e_b) + waits + gaps
    by_last = filling + e_f + e_b + microbatches * (f + b + last)
    return max(by_first, by_last)
