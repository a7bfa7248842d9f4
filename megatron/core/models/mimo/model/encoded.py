# SPDX-License-Identifier: Apache-2.0
"""Microbatches whose encoders have run before the language model does.

The encoders of all ranks run on several microbatches, and their rows are sent off. There they are
leaves: the language model's backward passes end at them. Once the gradients of all microbatches
are there they go back, and the encoders run backward.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron.core.models.mimo.model.leaves import Leaves

if TYPE_CHECKING:
    from megatron.core.models.mimo.model.later import LaterMicrobatches


@dataclass(frozen=True, eq=False)
class EncodedMicrobatch:
    """One microbatch, encoded: what the first language stage reads instead of encoder inputs.

    Attributes:
        rows: what the :class:`.RowPath` moved, as leaves.
        number: of the microbatch in its step, -1 if nobody counts.
        stands_for: of padding, the shape of the ``input_ids`` without elements that it replaces.
    """

    rows: Any
    number: int = -1
    stands_for: tuple[int, ...] | None = None


class EncodedMicrobatches:
    """Several microbatches, encoded together, and the way back for their gradients.

    Attributes:
        backward_per_microbatch: modalities whose encoders run backward once per microbatch, not
            once for all of them.
        later: the step's last ones, if they were left for later; they go back with the others.
    """

    def __init__(
        self,
        microbatches: list[EncodedMicrobatch],
        leaves: Leaves,
        backward_per_microbatch: Collection[str],
        later: LaterMicrobatches | None = None,
    ) -> None:
        self._microbatches, self._leaves, self.later = microbatches, leaves, later
        self.backward_per_microbatch = backward_per_microbatch

    @property
    def microbatches(self) -> list[EncodedMicrobatch]:
        """In the order in which they were given; waits for their rows."""
        self._leaves.land()
        return self._microbatches

    def send_back(self) -> None:
        """Start sending the leaves' gradients to the encoders, over routed bridges.

        All ranks call it together, when the first stages have run backward on every one of the
        microbatches.
        """
        self._leaves.send_back()

    def backward(self) -> None:
        """Send the leaves' gradients to the encoders and run these backward.

        All ranks call it together, once, as :meth:`send_back` or after it. Without encoders that
        train it does nothing.
        """
        self._leaves.backward()
