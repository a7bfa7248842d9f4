# SPDX-License-Identifier: Apache-2.0
"""Windows of microbatches: when encoders run in a step, and when gradients go back. Integers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Windows:
    """When which microbatches of a step are encoded and go back; the same on all ranks.

    Attributes:
        count: microbatches of the step.
        size: of a window: microbatches that are encoded together.
        ahead: windows that are encoded and sent off before the language model needs them.
        lag: windows that the first stage may have begun before it is through with one.
        stages: of the language model.
    """

    count: int
    size: int
    ahead: int
    lag: int
    stages: int

    @classmethod
    def of(cls, count: int, stages: int, encode_ahead: int | None) -> Windows:
        """Return those of a step; see :func:`.forward_backward_pipelined`.

        Args:
            count: microbatches.
            stages: of the language model.
            encode_ahead: with stages the size of a window, without how many go ahead.
        """
        if stages == 1 and encode_ahead is not None:
            return cls(count, 1, encode_ahead, 0, stages)
        size = encode_ahead or count
        return cls(count, size, 0, -(-(stages - 1) // size), stages)

    def upto(self, window: int) -> int:
        """Return how many windows are encoded when the language model begins with one."""
        return min(window + 1 + self.ahead, -(-self.count // self.size))


def before_the_first_input(later: int, stage: int, stages: int) -> int:
    """Return how many of a step's later microbatches a stage encodes before its first input.

    The others it encodes before its first gradient. Stage ``s`` of ``p`` waits ``s`` forward passes
    for the one and ``p - 1 - s`` backward passes for the other, so where encoding all of them takes
    no longer than ``p - 1`` forward passes, and a backward pass no less than a forward pass, no
    stage is late, but for what is left of whole microbatches.

    >>> [before_the_first_input(3, stage, 4) for stage in range(4)]
    [0, 1, 2, 3]
    """
    return later * stage // max(stages - 1, 1)
